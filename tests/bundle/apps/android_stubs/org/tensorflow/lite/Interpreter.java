package org.tensorflow.lite;

import java.nio.ByteBuffer;
import java.util.Map;

public final class Interpreter implements AutoCloseable {
    public static class Options {
        public Options setNumThreads(int numThreads) { return this; }
    }
    public Interpreter(ByteBuffer byteBuffer, Options options) {}
    public String[] getSignatureKeys() { return null; }
    public int getInputTensorCount() { return 0; }
    public int getOutputTensorCount() { return 0; }
    public Tensor getInputTensor(int inputIndex) { return null; }
    public Tensor getOutputTensor(int outputIndex) { return null; }
    public Tensor getInputTensorFromSignature(String inputName, String signatureKey) { return null; }
    public Tensor getOutputTensorFromSignature(String outputName, String signatureKey) { return null; }
    public void resizeInput(int idx, int[] dims) {}
    public void runForMultipleInputsOutputs(Object[] inputs, Map<Integer, Object> outputs) {}
    public void close() {}
}
