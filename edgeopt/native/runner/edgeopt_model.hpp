// A model file behind one small interface, whichever runtime opens it.
//
// Link exactly one implementation: litert.cpp (.tflite), onnxruntime.cpp (.onnx) or executorch.cpp (.pte). What to
// compile and link for each is listed in edgeopt/native/__init__.py.
//
//     auto model = edgeopt::Model::open("model.tflite", 4);
//     edgeopt::Tensor input = edgeopt::make_tensor(edgeopt::DType::kFloat32, {1, 224, 224, 3});
//     fill(input.as<float>(), input.elements());
//     std::vector<edgeopt::Tensor> outputs = model->run({input});
//     const float* scores = outputs[0].as<float>();
//
// Tensors are in the file's own terms: its element types, its layout, C order, no quantization applied. A bundle's
// manifest.json says how they map to the trained model's. Plain C++17; errors are exceptions of type edgeopt::Error.

#ifndef EDGEOPT_MODEL_HPP_
#define EDGEOPT_MODEL_HPP_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

namespace edgeopt {

// What went wrong, in one line that a person can read.
class Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

// Element types; `name_of` gives the names that manifest.json uses ("float32", "int8", ...). Float16 is IEEE binary16
// and travels as 2 raw bytes; bool is 1 byte, 0 or 1.
enum class DType { kFloat32, kFloat16, kInt8, kUInt8, kInt16, kInt32, kInt64, kBool };

inline const char* name_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return "float32";
    case DType::kFloat16: return "float16";
    case DType::kInt8: return "int8";
    case DType::kUInt8: return "uint8";
    case DType::kInt16: return "int16";
    case DType::kInt32: return "int32";
    case DType::kInt64: return "int64";
    case DType::kBool: return "bool";
  }
  return "unknown";
}

// Bytes of one element.
inline std::size_t size_of(DType dtype) {
  switch (dtype) {
    case DType::kInt64: return 8;
    case DType::kFloat32:
    case DType::kInt32: return 4;
    case DType::kFloat16:
    case DType::kInt16: return 2;
    case DType::kInt8:
    case DType::kUInt8:
    case DType::kBool: return 1;
  }
  return 0;
}

// Sizes from the outermost dimension to the innermost; empty for a scalar.
using Shape = std::vector<std::int64_t>;

// In the shape of a TensorInfo: any size goes.
constexpr std::int64_t kFree = -1;

// What a file says about one of its inputs or outputs.
struct TensorInfo {
  // LiteRT: the name in the signature, or the tensor's where the file has no signature. ONNX: the tensor's name.
  // ExecuTorch: what the file tells, which is mostly nothing; tensors are told apart by position.
  std::string name;
  DType dtype = DType::kFloat32;
  // ONNX Runtime has kFree where the file leaves a size open. The others don't tell which sizes are free: LiteRT has the
  // one that it begins with there, ExecuTorch the largest.
  Shape shape;
};

// Values with their type and shape. `data` holds elements() * size_of(dtype) bytes.
struct Tensor {
  DType dtype = DType::kFloat32;
  Shape shape;
  std::vector<unsigned char> data;

  std::size_t elements() const { return data.size() / size_of(dtype); }

  // The elements; `T` must have the size of one.
  template <typename T>
  T* as() {
    return reinterpret_cast<T*>(data.data());
  }
  template <typename T>
  const T* as() const {
    return reinterpret_cast<const T*>(data.data());
  }
};

// Number of elements of a shape without free sizes. Throws Error for a negative size or one beyond the address space.
inline std::size_t elements_of(const Shape& shape) {
  constexpr std::uint64_t kMost = static_cast<std::uint64_t>(PTRDIFF_MAX) / 8;  // so that 8-byte elements fit, too
  std::uint64_t elements = 1;
  bool empty = false;
  for (const std::int64_t size : shape) {
    if (size < 0) throw Error("a shape has a negative size");
    if (size == 0) {
      empty = true;
    } else if (static_cast<std::uint64_t>(size) > kMost / elements) {
      throw Error("a shape has too many elements");
    } else {
      elements *= static_cast<std::uint64_t>(size);
    }
  }
  return empty ? 0 : static_cast<std::size_t>(elements);
}

// A tensor of zeros.
inline Tensor make_tensor(DType dtype, const Shape& shape) {
  return Tensor{dtype, shape, std::vector<unsigned char>(elements_of(shape) * size_of(dtype))};
}

// An opened file. Not thread-safe: one thread at a time per object.
class Model {
 public:
  // Opens a file. `threads` is how many CPU threads one inference may use; ExecuTorch has one pool per process, which
  // the last call sizes. Throws Error where the runtime refuses the file.
  static std::unique_ptr<Model> open(const std::string& path, int threads);

  virtual ~Model() = default;
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

  // In the file's order, which `run` uses, too. That need not be the order of the manifest: look names up.
  virtual const std::vector<TensorInfo>& inputs() const = 0;
  virtual const std::vector<TensorInfo>& outputs() const = 0;

  // One inference, inputs in the order of inputs(), outputs in that of outputs(). Throws Error where the inputs don't
  // fit, and where the runtime fails.
  virtual std::vector<Tensor> run(const std::vector<Tensor>& inputs) = 0;

 protected:
  Model() = default;
};

}  // namespace edgeopt

#endif  // EDGEOPT_MODEL_HPP_
