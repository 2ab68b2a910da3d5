package ai.onnxruntime;

import java.util.Map;
import java.util.Optional;
import java.util.Set;

public class OrtSession implements AutoCloseable {
    public static class SessionOptions implements AutoCloseable {
        public void setIntraOpNumThreads(int numThreads) throws OrtException {}
        public void addQnn(Map<String, String> providerOptions) throws OrtException {}
        public void close() {}
    }
    public static class Result implements AutoCloseable, Iterable<Map.Entry<String, OnnxValue>> {
        public Optional<OnnxValue> get(String key) { return null; }
        public OnnxValue get(int index) { return null; }
        public java.util.Iterator<Map.Entry<String, OnnxValue>> iterator() { return null; }
        public void close() {}
    }
    public Result run(Map<String, ? extends OnnxTensorLike> inputs, Set<String> requestedOutputs) throws OrtException { return null; }
    public void close() throws OrtException {}
}
