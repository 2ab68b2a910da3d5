package ai.onnxruntime;

public abstract class OnnxTensorLike implements OnnxValue {
    public TensorInfo getInfo() { return null; }
    public void close() {}
}
