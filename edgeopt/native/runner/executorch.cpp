// edgeopt::Model for ExecuTorch (.pte): the method "forward", on whatever kernels and backends the program links.
//
// They register themselves as their libraries are loaded, so the linker must keep libraries that nothing calls
// (-Wl,--no-as-needed): XNNPACK's backend, the optimized kernels (which include the portable ones) and the quantized.

#include <executorch/extension/module/module.h>
#include <executorch/extension/tensor/tensor.h>

#include <cstring>
#include <string>

#if __has_include(<executorch/extension/threadpool/threadpool.h>)
#include <executorch/extension/threadpool/threadpool.h>
#else
// The Python package has the thread pool's library without its header. These are the two members that we call.
namespace executorch::extension::threadpool {
class ThreadPool final {
 public:
  std::size_t get_thread_count() const;
  bool _unsafe_reset_threadpool(std::uint32_t threads);
};
ThreadPool* get_threadpool();
}  // namespace executorch::extension::threadpool
#endif

#include "checks.hpp"
#include "edgeopt_model.hpp"

namespace edgeopt {
namespace {

using executorch::aten::ScalarType;
using executorch::extension::Module;
using executorch::extension::TensorPtr;
using executorch::runtime::EValue;

constexpr const char* kMethod = "forward";

// Throws where a call failed. ExecuTorch writes the reason to stderr; a code is all that it returns.
void check(executorch::runtime::Error error, const char* what) {
  if (error == executorch::runtime::Error::Ok) return;
  throw Error(std::string("ExecuTorch can't ") + what + " (" + executorch::runtime::to_string(error) + ")");
}

DType dtype_of(ScalarType type, const std::string& label) {
  switch (type) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::Char: return DType::kInt8;
    case ScalarType::Byte: return DType::kUInt8;
    case ScalarType::Short: return DType::kInt16;
    case ScalarType::Int: return DType::kInt32;
    case ScalarType::Long: return DType::kInt64;
    case ScalarType::Bool: return DType::kBool;
    default: throw Error(label + " has the scalar type " + std::to_string(static_cast<int>(type)) +
                         " of torch, which can't be fed or read");
  }
}

ScalarType scalar_type_of(DType dtype) {
  switch (dtype) {
    case DType::kFloat32: return ScalarType::Float;
    case DType::kFloat16: return ScalarType::Half;
    case DType::kInt8: return ScalarType::Char;
    case DType::kUInt8: return ScalarType::Byte;
    case DType::kInt16: return ScalarType::Short;
    case DType::kInt32: return ScalarType::Int;
    case DType::kInt64: return ScalarType::Long;
    case DType::kBool: return ScalarType::Bool;
  }
  return ScalarType::Undefined;
}

// The pool belongs to the process. Backends take it as a file is loaded, so this comes first.
void set_threads(int threads) {
  auto* pool = executorch::extension::threadpool::get_threadpool();
  const auto wanted = static_cast<std::uint32_t>(threads);
  if (pool != nullptr && pool->get_thread_count() != wanted && !pool->_unsafe_reset_threadpool(wanted)) {
    throw Error("ExecuTorch can't make a pool of " + std::to_string(threads) + " threads");
  }
}

// A tensor's values in C order, whatever order its memory has (channels last, for one).
void copy_in_c_order(const executorch::aten::Tensor& from, Tensor& to) {
  const auto* source = static_cast<const unsigned char*>(from.const_data_ptr());
  const std::size_t item = size_of(to.dtype), rank = to.shape.size(), elements = to.elements();
  const auto strides = from.strides();
  std::int64_t dense = 1;
  bool in_order = true;
  for (std::size_t axis = rank; axis-- > 0;) {
    in_order = in_order && (to.shape[axis] == 1 || strides[axis] == dense);
    dense *= to.shape[axis];
  }
  if (elements == 0) return;
  if (in_order) {
    std::memcpy(to.data.data(), source, to.data.size());
    return;
  }
  Shape place(rank, 0);
  for (std::size_t i = 0; i < elements; ++i) {
    std::size_t offset = 0;
    for (std::size_t axis = 0; axis < rank; ++axis) {
      offset += static_cast<std::size_t>(place[axis]) * static_cast<std::size_t>(strides[axis]);
    }
    std::memcpy(to.data.data() + i * item, source + offset * item, item);
    for (std::size_t axis = rank; axis-- > 0 && ++place[axis] == to.shape[axis];) place[axis] = 0;
  }
}

class ExecuTorchFile final : public Model {
 public:
  explicit ExecuTorchFile(const std::string& path) : module_(path) {
    check(module_.load(), "open the file: it is missing or no ExecuTorch program");
    check(module_.load_method(kMethod),
          "load the method 'forward': the file has none, or an operator or backend that this ExecuTorch lacks");
    read_signature();
  }

  const std::vector<TensorInfo>& inputs() const override { return inputs_; }
  const std::vector<TensorInfo>& outputs() const override { return outputs_; }

  std::vector<Tensor> run(const std::vector<Tensor>& inputs) override {
    check_inputs(inputs_, inputs, Sizes::kLargest);
    std::vector<TensorPtr> tensors;
    std::vector<EValue> values;
    for (const Tensor& input : inputs) {
      const std::vector<executorch::aten::SizesType> sizes(input.shape.begin(), input.shape.end());
      // The method copies its inputs or only reads them.
      auto* data = const_cast<unsigned char*>(input.data.data());
      tensors.push_back(executorch::extension::from_blob(data, sizes, scalar_type_of(input.dtype)));
      values.emplace_back(*tensors.back());
    }
    const auto results = module_.execute(kMethod, values);
    check(results.error(), "run the model on inputs of these shapes");
    std::vector<Tensor> outputs;
    for (std::size_t i = 0; i < results->size(); ++i) outputs.push_back(fetch(i, (*results)[i]));
    return outputs;
  }

 private:
  void read_signature() {
    const auto meta = module_.method_meta(kMethod);
    check(meta.error(), "describe the method 'forward'");
    for (std::size_t i = 0; i < meta->num_inputs(); ++i) {
      inputs_.push_back(describe("input " + std::to_string(i), meta->input_tag(i), meta->input_tensor_meta(i)));
    }
    for (std::size_t i = 0; i < meta->num_outputs(); ++i) {
      outputs_.push_back(describe("output " + std::to_string(i), meta->output_tag(i), meta->output_tensor_meta(i)));
    }
  }

  static TensorInfo describe(const std::string& label, const executorch::runtime::Result<executorch::runtime::Tag>& tag,
                             const executorch::runtime::Result<executorch::runtime::TensorInfo>& tensor) {
    check(tag.error(), "tell a type");
    if (*tag != executorch::runtime::Tag::Tensor) throw Error(label + " is no tensor");
    check(tensor.error(), "describe a tensor");
    const auto sizes = tensor->sizes();
    return {std::string(tensor->name()), dtype_of(tensor->scalar_type(), label), Shape(sizes.begin(), sizes.end())};
  }

  // A copy: the next run uses the method's memory again.
  Tensor fetch(std::size_t index, const EValue& value) const {
    const std::string label = "output " + label_of(outputs_, index);
    if (!value.isTensor()) throw Error(label + " is no tensor");
    const executorch::aten::Tensor& made = value.toTensor();
    const auto sizes = made.sizes();
    Tensor tensor = make_tensor(dtype_of(made.scalar_type(), label), Shape(sizes.begin(), sizes.end()));
    copy_in_c_order(made, tensor);
    return tensor;
  }

  Module module_;
  std::vector<TensorInfo> inputs_, outputs_;
};

}  // namespace

std::unique_ptr<Model> Model::open(const std::string& path, int threads) {
  set_threads(threads);
  return std::make_unique<ExecuTorchFile>(path);
}

}  // namespace edgeopt
