package org.tensorflow.lite;

public interface Tensor {
    int[] shape();
    int index();
    String name();
    java.nio.ByteBuffer asReadOnlyBuffer();
}
