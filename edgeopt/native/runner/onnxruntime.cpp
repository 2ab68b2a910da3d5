// edgeopt::Model for ONNX Runtime (.onnx) on its C API, on the CPU.
//
// The options are those of edgeopt's Python runtime, so that results compare: every graph optimization on, one
// inter-op thread, ONNX Runtime's defaults for the rest.

#include <onnxruntime_c_api.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "checks.hpp"
#include "edgeopt_model.hpp"

namespace edgeopt {
namespace {

// The C API only grows, and every function used here was in its first version: any ONNX Runtime will do.
constexpr std::uint32_t kApiVersion = 1;

const OrtApi& api() {
  const OrtApi* found = OrtGetApiBase()->GetApi(kApiVersion);
  if (found == nullptr) throw Error("this ONNX Runtime has no C API of version " + std::to_string(kApiVersion));
  return *found;
}

void check(OrtStatus* status, const char* what) {
  if (status == nullptr) return;
  const std::string reason = api().GetErrorMessage(status);
  api().ReleaseStatus(status);
  throw Error(std::string("ONNX Runtime can't ") + what + ": " + reason);
}

struct Release {
  void operator()(OrtEnv* object) const { api().ReleaseEnv(object); }
  void operator()(OrtSessionOptions* object) const { api().ReleaseSessionOptions(object); }
  void operator()(OrtSession* object) const { api().ReleaseSession(object); }
  void operator()(OrtMemoryInfo* object) const { api().ReleaseMemoryInfo(object); }
  void operator()(OrtTypeInfo* object) const { api().ReleaseTypeInfo(object); }
  void operator()(OrtTensorTypeAndShapeInfo* object) const { api().ReleaseTensorTypeAndShapeInfo(object); }
  void operator()(OrtValue* object) const { api().ReleaseValue(object); }
};

template <typename Object>
using Owned = std::unique_ptr<Object, Release>;

DType dtype_of(ONNXTensorElementDataType type, const std::string& name) {
  switch (type) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return DType::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return DType::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return DType::kInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8: return DType::kUInt8;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16: return DType::kInt16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32: return DType::kInt32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64: return DType::kInt64;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL: return DType::kBool;
    default: throw Error("'" + name + "' has the ONNX element type " + std::to_string(type) + ", which can't be fed "
                         "or read");
  }
}

ONNXTensorElementDataType element_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    case DType::kFloat16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    case DType::kInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    case DType::kUInt8: return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    case DType::kInt16: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT16;
    case DType::kInt32: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    case DType::kInt64: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    case DType::kBool: return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
  }
  return ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
}

TensorInfo describe(const std::string& name, const OrtTensorTypeAndShapeInfo& tensor) {
  ONNXTensorElementDataType type = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  std::size_t rank = 0;
  check(api().GetTensorElementType(&tensor, &type), "tell an element type");
  check(api().GetDimensionsCount(&tensor, &rank), "tell a shape");
  Shape shape(rank);
  check(api().GetDimensions(&tensor, shape.data(), rank), "tell a shape");
  for (std::int64_t& size : shape) {
    if (size < 0) size = kFree;
  }
  return {name, dtype_of(type, name), shape};
}

TensorInfo describe(const std::string& name, const OrtTypeInfo& info) {
  const OrtTensorTypeAndShapeInfo* tensor = nullptr;  // belongs to `info`
  check(api().CastTypeInfoToTensorInfo(&info, &tensor), "tell a type");
  if (tensor == nullptr) throw Error("'" + name + "' is no tensor");
  return describe(name, *tensor);
}

// ONNX Runtime's own builds for Linux begin a database of usage data below ~/.cache/Microsoft as the environment is
// made, and send it from threads of their own. A user who has set the variable decides for himself.
void opt_out_of_telemetry() { setenv("ORT_DISABLE_TELEMETRY", "1", /*overwrite=*/0); }

class OnnxFile final : public Model {
 public:
  OnnxFile(const std::string& path, int threads) {
    opt_out_of_telemetry();
    OrtEnv* environment = nullptr;
    check(api().CreateEnv(ORT_LOGGING_LEVEL_ERROR, "edgeopt", &environment), "start");
    environment_.reset(environment);
    OrtSessionOptions* made = nullptr;
    check(api().CreateSessionOptions(&made), "make options");
    const Owned<OrtSessionOptions> options(made);
    check(api().SetIntraOpNumThreads(made, threads), "set the number of threads");
    check(api().SetInterOpNumThreads(made, 1), "set the number of threads");
    check(api().SetSessionGraphOptimizationLevel(made, ORT_ENABLE_ALL), "set the optimization level");
    OrtSession* session = nullptr;
    check(api().CreateSession(environment, path.c_str(), made, &session), "open the file");
    session_.reset(session);
    OrtMemoryInfo* memory = nullptr;
    check(api().CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory), "describe memory");
    memory_.reset(memory);
    read_signature();
  }

  const std::vector<TensorInfo>& inputs() const override { return inputs_; }
  const std::vector<TensorInfo>& outputs() const override { return outputs_; }

  std::vector<Tensor> run(const std::vector<Tensor>& inputs) override {
    check_inputs(inputs_, inputs, Sizes::kExact);
    std::vector<Owned<OrtValue>> feeds;
    std::vector<const OrtValue*> values;
    std::vector<const char*> input_names, output_names;
    for (std::size_t i = 0; i < inputs.size(); ++i) {
      feeds.push_back(wrap(inputs[i]));
      values.push_back(feeds.back().get());
      input_names.push_back(inputs_[i].name.c_str());
    }
    for (const TensorInfo& output : outputs_) output_names.push_back(output.name.c_str());
    std::vector<OrtValue*> made(outputs_.size(), nullptr);
    OrtStatus* status = api().Run(session_.get(), nullptr, input_names.data(), values.data(), values.size(),
                                  output_names.data(), output_names.size(), made.data());
    std::vector<Owned<OrtValue>> results(made.begin(), made.end());  // whatever it made, even where it failed
    check(status, "run the model");
    std::vector<Tensor> outputs;
    for (std::size_t i = 0; i < outputs_.size(); ++i) outputs.push_back(fetch(i, results[i].get()));
    return outputs;
  }

 private:
  void read_signature() {
    std::size_t num_inputs = 0, num_outputs = 0;
    check(api().SessionGetInputCount(session_.get(), &num_inputs), "count the inputs");
    check(api().SessionGetOutputCount(session_.get(), &num_outputs), "count the outputs");
    for (std::size_t i = 0; i < num_inputs; ++i) {
      OrtTypeInfo* info = nullptr;
      check(api().SessionGetInputTypeInfo(session_.get(), i, &info), "tell an input's type");
      inputs_.push_back(describe(name_at(i, api().SessionGetInputName), *Owned<OrtTypeInfo>(info)));
    }
    for (std::size_t i = 0; i < num_outputs; ++i) {
      OrtTypeInfo* info = nullptr;
      check(api().SessionGetOutputTypeInfo(session_.get(), i, &info), "tell an output's type");
      outputs_.push_back(describe(name_at(i, api().SessionGetOutputName), *Owned<OrtTypeInfo>(info)));
    }
  }

  template <typename GetName>
  std::string name_at(std::size_t index, GetName get_name) const {
    OrtAllocator* allocator = nullptr;  // the process's own
    check(api().GetAllocatorWithDefaultOptions(&allocator), "allocate");
    char* name = nullptr;
    check(get_name(session_.get(), index, allocator, &name), "name a tensor");
    const std::string copy = name;
    check(api().AllocatorFree(allocator, name), "free a name");
    return copy;
  }

  // A value that reads the tensor's own memory; ONNX Runtime takes a pointer to data that it does not change.
  Owned<OrtValue> wrap(const Tensor& tensor) const {
    OrtValue* value = nullptr;
    check(api().CreateTensorWithDataAsOrtValue(memory_.get(), const_cast<unsigned char*>(tensor.data.data()),
                                               tensor.data.size(), tensor.shape.data(), tensor.shape.size(),
                                               element_type_of(tensor.dtype), &value),
          "take an input");
    return Owned<OrtValue>(value);
  }

  Tensor fetch(std::size_t index, OrtValue* value) const {
    OrtTensorTypeAndShapeInfo* made = nullptr;
    check(api().GetTensorTypeAndShape(value, &made), "tell an output's shape");
    const Owned<OrtTensorTypeAndShapeInfo> info(made);
    const TensorInfo actual = describe(outputs_[index].name, *info);
    Tensor tensor = make_tensor(actual.dtype, actual.shape);
    void* address = nullptr;
    check(api().GetTensorMutableData(value, &address), "read an output");
    if (!tensor.data.empty()) std::memcpy(tensor.data.data(), address, tensor.data.size());
    return tensor;
  }

  // In this order: each is released before what it was made from.
  Owned<OrtEnv> environment_;
  Owned<OrtSession> session_;
  Owned<OrtMemoryInfo> memory_;
  std::vector<TensorInfo> inputs_, outputs_;
};

}  // namespace

std::unique_ptr<Model> Model::open(const std::string& path, int threads) {
  return std::make_unique<OnnxFile>(path, threads);
}

}  // namespace edgeopt
