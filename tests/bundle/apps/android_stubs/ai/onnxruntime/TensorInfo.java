package ai.onnxruntime;

public class TensorInfo {
    public long[] getShape() { return null; }
}
