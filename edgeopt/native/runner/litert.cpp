// edgeopt::Model for LiteRT (.tflite) on libLiteRt.so's CompiledModel, on the CPU: XNNPACK kernels where they exist,
// LiteRT's own elsewhere. The file's first signature is run.

#include <cstdlib>
#include <cstring>
#include <string>
#include <utility>

#include "checks.hpp"
#include "edgeopt_model.hpp"
#include "litert_c_api.hpp"

namespace edgeopt {
namespace {

constexpr LiteRtParamIndex kSignature = 0;

// Throws where a call failed. LiteRT writes the reason to stderr; a status is all that it returns.
void check(LiteRtStatus status, const char* what) {
  if (status != 0) throw Error(std::string("LiteRT can't ") + what + " (status " + std::to_string(status) + ")");
}

// Owns one handle.
template <typename Handle, void (*destroy)(Handle)>
class Owned {
 public:
  Owned() = default;
  Owned(Owned&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Owned& operator=(Owned&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }
  ~Owned() {
    if (handle_ != nullptr) destroy(handle_);
  }
  Handle get() const { return handle_; }
  Handle* out() { return &handle_; }

 private:
  Handle handle_ = nullptr;
};

using Environment = Owned<LiteRtEnvironment, LiteRtDestroyEnvironment>;
using File = Owned<LiteRtModel, LiteRtDestroyModel>;
using Options = Owned<LiteRtOptions, LiteRtDestroyOptions>;
using Compiled = Owned<LiteRtCompiledModel, LiteRtDestroyCompiledModel>;
using Buffer = Owned<LiteRtTensorBuffer, LiteRtDestroyTensorBuffer>;

DType dtype_of(int element_type, const std::string& name) {
  switch (element_type) {
    case kLiteRtFloat32: return DType::kFloat32;
    case kLiteRtFloat16: return DType::kFloat16;
    case kLiteRtInt8: return DType::kInt8;
    case kLiteRtUInt8: return DType::kUInt8;
    case kLiteRtInt16: return DType::kInt16;
    case kLiteRtInt32: return DType::kInt32;
    case kLiteRtInt64: return DType::kInt64;
    case kLiteRtBool: return DType::kBool;
    default: throw Error("'" + name + "' has the element type " + std::to_string(element_type) + " of LiteRT, which "
                         "can't be fed or read");
  }
}

int element_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return kLiteRtFloat32;
    case DType::kFloat16: return kLiteRtFloat16;
    case DType::kInt8: return kLiteRtInt8;
    case DType::kUInt8: return kLiteRtUInt8;
    case DType::kInt16: return kLiteRtInt16;
    case DType::kInt32: return kLiteRtInt32;
    case DType::kInt64: return kLiteRtInt64;
    case DType::kBool: return kLiteRtBool;
  }
  return 0;
}

Shape shape_of(const LiteRtLayout& layout) {
  Shape shape(layout.dimensions, layout.dimensions + layout.rank);
  for (std::int64_t& size : shape) {
    if (size < 0) size = kFree;
  }
  return shape;
}

LiteRtRankedTensorType type_of(DType dtype, const Shape& shape) {
  LiteRtRankedTensorType type = {};
  type.element_type = element_type_of(dtype);
  type.layout.rank = static_cast<unsigned>(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    type.layout.dimensions[axis] = static_cast<std::int32_t>(shape[axis]);
  }
  return type;
}

TensorInfo describe(const char* name, LiteRtTensor tensor) {
  LiteRtRankedTensorType type = {};
  check(LiteRtGetRankedTensorType(tensor, &type), "tell the type of a tensor");
  return {name, dtype_of(type.element_type, name), shape_of(type.layout)};
}

// The CPU with a number of threads. The option is text, as LiteRT's own wrappers send it.
Options cpu_options(int threads) {
  const std::string text = "num_threads = " + std::to_string(threads) + "\n";
  void* payload = std::malloc(text.size() + 1);
  if (payload == nullptr) throw Error("out of memory");
  std::memcpy(payload, text.c_str(), text.size() + 1);
  LiteRtOpaqueOptions opaque = nullptr;
  if (const LiteRtStatus status = LiteRtCreateOpaqueOptions("cpu_options_string", payload, std::free, &opaque)) {
    std::free(payload);
    check(status, "make options");
  }
  Options options;
  check(LiteRtCreateOptions(options.out()), "make options");
  check(LiteRtSetOptionsHardwareAccelerators(options.get(), kLiteRtCpu), "choose the CPU");
  check(LiteRtAddOpaqueOptions(options.get(), opaque), "set the number of threads");
  return options;
}

// The address of a buffer while this lives.
class Lock {
 public:
  Lock(LiteRtTensorBuffer buffer, int mode) : buffer_(buffer) {
    check(LiteRtLockTensorBuffer(buffer, &address_, mode), "reach a tensor's memory");
  }
  ~Lock() { LiteRtUnlockTensorBuffer(buffer_); }
  Lock(const Lock&) = delete;
  Lock& operator=(const Lock&) = delete;
  void* address() const { return address_; }

 private:
  LiteRtTensorBuffer buffer_;
  void* address_ = nullptr;
};

class LiteRtFile final : public Model {
 public:
  LiteRtFile(const std::string& path, int threads) {
    check(LiteRtCreateEnvironment(0, nullptr, environment_.out()), "start");
    check(LiteRtCreateModelFromFile(environment_.get(), path.c_str(), file_.out()), "read the file");
    read_signature();
    const Options options = cpu_options(threads);
    check(LiteRtCreateCompiledModel(environment_.get(), file_.get(), options.get(), compiled_.out()),
          "compile the file");
    input_buffers_.resize(inputs_.size());
    for (const TensorInfo& input : inputs_) input_shapes_.push_back(input.shape);
    // LiteRT notices only now that it lacks an operator.
    fit_buffers(input_shapes_);
  }

  const std::vector<TensorInfo>& inputs() const override { return inputs_; }
  const std::vector<TensorInfo>& outputs() const override { return outputs_; }

  std::vector<Tensor> run(const std::vector<Tensor>& inputs) override {
    check_inputs(inputs_, inputs, Sizes::kInitial);
    std::vector<Shape> shapes;
    for (const Tensor& input : inputs) shapes.push_back(input.shape);
    fit_buffers(shapes);
    std::vector<LiteRtTensorBuffer> feeds, results;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      if (!inputs[i].data.empty()) {
        const Lock lock(input_buffers_[i].get(), kLiteRtLockWrite);
        std::memcpy(lock.address(), inputs[i].data.data(), inputs[i].data.size());
      }
      feeds.push_back(input_buffers_[i].get());
    }
    for (const Buffer& buffer : output_buffers_) results.push_back(buffer.get());
    check(LiteRtRunCompiledModel(compiled_.get(), kSignature, feeds.size(), feeds.data(), results.size(),
                                 results.data()),
          "run the model");
    std::vector<Tensor> outputs;
    for (std::size_t i = 0; i < outputs_.size(); ++i) outputs.push_back(fetch(i));
    return outputs;
  }

 private:
  void read_signature() {
    LiteRtSignature signature = nullptr;
    LiteRtParamIndex count = 0, num_inputs = 0, num_outputs = 0;
    check(LiteRtGetNumModelSignatures(file_.get(), &count), "read the file's signatures");
    if (count == 0) throw Error("the file has nothing to run");
    check(LiteRtGetModelSignature(file_.get(), kSignature, &signature), "read the file's first signature");
    check(LiteRtGetNumSignatureInputs(signature, &num_inputs), "count the inputs");
    check(LiteRtGetNumSignatureOutputs(signature, &num_outputs), "count the outputs");
    const char* name = nullptr;
    LiteRtTensor tensor = nullptr;
    for (LiteRtParamIndex i = 0; i < num_inputs; ++i) {
      check(LiteRtGetSignatureInputName(signature, i, &name), "name an input");
      check(LiteRtGetSignatureInputTensorByIndex(signature, i, &tensor), "find an input");
      inputs_.push_back(describe(name, tensor));
    }
    for (LiteRtParamIndex i = 0; i < num_outputs; ++i) {
      check(LiteRtGetSignatureOutputName(signature, i, &name), "name an output");
      check(LiteRtGetSignatureOutputTensorByIndex(signature, i, &tensor), "find an output");
      outputs_.push_back(describe(name, tensor));
    }
  }

  // Buffers for inputs of these shapes. LiteRT resizes its tensors only when asked to, and all its outputs may follow.
  void fit_buffers(const std::vector<Shape>& shapes) {
    const bool resized = resize_inputs(shapes);
    if (!resized && output_buffers_.size() == outputs_.size()) return;
    std::vector<LiteRtLayout> layouts(outputs_.size());
    check(LiteRtGetCompiledModelOutputTensorLayouts(compiled_.get(), kSignature, layouts.size(), layouts.data(), true),
          "plan memory: the file has an operator that this LiteRT lacks, or shapes that don't fit together");
    allocate_inputs(shapes);
    allocate_outputs(layouts);
  }

  // Whether any input changed its shape. Those have no buffer then.
  bool resize_inputs(const std::vector<Shape>& shapes) {
    bool changed = false;
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      if (input_shapes_[i] == shapes[i]) continue;
      const std::vector<int> sizes(shapes[i].begin(), shapes[i].end());
      const LiteRtStatus status =
          LiteRtCompiledModelResizeInputTensor(compiled_.get(), kSignature, i, sizes.data(), sizes.size());
      if (status != 0) refuse_shape(inputs_, i, shapes[i], "which the model does not take in place of ");
      changed = true;
      input_shapes_[i] = shapes[i];
      input_buffers_[i] = Buffer();
      // Should something fail from here on, the next run must not take these for ones that fit.
      output_buffers_.clear();
    }
    return changed;
  }

  void allocate_inputs(const std::vector<Shape>& shapes) {
    for (std::size_t i = 0; i < shapes.size(); ++i) {
      if (input_buffers_[i].get() != nullptr) continue;
      LiteRtTensorBufferRequirements needs = nullptr;
      check(LiteRtGetCompiledModelInputBufferRequirements(compiled_.get(), kSignature, i, &needs), "plan an input");
      input_buffers_[i] = make_buffer(type_of(inputs_[i].dtype, shapes[i]), needs);
    }
  }

  void allocate_outputs(const std::vector<LiteRtLayout>& layouts) {
    output_shapes_.clear();
    std::vector<Buffer> buffers;
    for (std::size_t i = 0; i < outputs_.size(); ++i) {
      output_shapes_.push_back(shape_of(layouts[i]));
      LiteRtTensorBufferRequirements needs = nullptr;
      check(LiteRtGetCompiledModelOutputBufferRequirements(compiled_.get(), kSignature, i, &needs), "plan an output");
      buffers.push_back(make_buffer(type_of(outputs_[i].dtype, output_shapes_[i]), needs));
    }
    output_buffers_ = std::move(buffers);
  }

  Buffer make_buffer(const LiteRtRankedTensorType& type, LiteRtTensorBufferRequirements needs) const {
    Buffer buffer;
    check(LiteRtCreateManagedTensorBufferFromRequirements(environment_.get(), &type, needs, buffer.out()),
          "allocate a tensor");
    return buffer;
  }

  Tensor fetch(std::size_t output) const {
    Tensor tensor = make_tensor(outputs_[output].dtype, output_shapes_[output]);
    if (tensor.data.empty()) return tensor;
    std::size_t bytes = 0;
    check(LiteRtGetTensorBufferPackedSize(output_buffers_[output].get(), &bytes), "measure an output");
    if (bytes < tensor.data.size()) throw Error("output " + label_of(outputs_, output) + " is shorter than its shape");
    const Lock lock(output_buffers_[output].get(), kLiteRtLockRead);
    std::memcpy(tensor.data.data(), lock.address(), tensor.data.size());
    return tensor;
  }

  // In this order: each is destroyed before what it was made from.
  Environment environment_;
  File file_;
  Compiled compiled_;
  std::vector<TensorInfo> inputs_, outputs_;
  std::vector<Buffer> input_buffers_, output_buffers_;
  std::vector<Shape> input_shapes_, output_shapes_;
};

}  // namespace

std::unique_ptr<Model> Model::open(const std::string& path, int threads) {
  return std::make_unique<LiteRtFile>(path, threads);
}

}  // namespace edgeopt
