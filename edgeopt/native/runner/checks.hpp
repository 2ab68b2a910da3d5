// Checks that the implementations of edgeopt::Model share.

#ifndef EDGEOPT_CHECKS_HPP_
#define EDGEOPT_CHECKS_HPP_

#include <string>
#include <vector>

#include "edgeopt_model.hpp"

namespace edgeopt {

// "(1, 3, ?)"; free sizes are question marks.
inline std::string text_of(const Shape& shape) {
  std::string text = "(";
  for (const std::int64_t size : shape) {
    if (text.size() > 1) text += ", ";
    text += size == kFree ? "?" : std::to_string(size);
  }
  return text + ")";
}

// How messages call a tensor: by its name, or by its number where the file has no names.
inline std::string label_of(const std::vector<TensorInfo>& infos, std::size_t index) {
  const std::string& name = infos[index].name;
  return name.empty() ? std::to_string(index) : "'" + name + "'";
}

// What the sizes in a TensorInfo mean: the only ones (free sizes apart), the largest, or those to begin with, of which
// only the runtime knows whether they can change.
enum class Sizes { kExact, kLargest, kInitial };

inline bool fits(std::int64_t have, std::int64_t want, Sizes sizes) {
  switch (sizes) {
    case Sizes::kExact: return want == kFree || have == want;
    case Sizes::kLargest: return have <= want;
    case Sizes::kInitial: return true;
  }
  return false;
}

// Throws the Error for a shape that the model does not take.
[[noreturn]] inline void refuse_shape(const std::vector<TensorInfo>& infos, std::size_t index, const Shape& given,
                                      const char* takes) {
  throw Error("input " + label_of(infos, index) + " has the shape " + text_of(given) + ", " + takes +
              text_of(infos[index].shape));
}

// Throws Error where the inputs are not what the file takes.
inline void check_inputs(const std::vector<TensorInfo>& infos, const std::vector<Tensor>& inputs, Sizes sizes) {
  if (inputs.size() != infos.size()) {
    throw Error("got " + std::to_string(inputs.size()) + " inputs, the model takes " + std::to_string(infos.size()));
  }
  for (std::size_t i = 0; i < infos.size(); ++i) {
    const Tensor& given = inputs[i];
    const std::string label = "input " + label_of(infos, i);
    if (given.dtype != infos[i].dtype) {
      throw Error(label + " is " + name_of(given.dtype) + ", the model takes " + name_of(infos[i].dtype));
    }
    bool good = given.shape.size() == infos[i].shape.size();
    for (std::size_t axis = 0; good && axis < given.shape.size(); ++axis) {
      good = fits(given.shape[axis], infos[i].shape[axis], sizes);
    }
    const char* takes = sizes == Sizes::kLargest ? "the model takes at most " : "the model takes ";
    if (!good) refuse_shape(infos, i, given.shape, takes);
    if (given.data.size() != elements_of(given.shape) * size_of(given.dtype)) {
      throw Error(label + " has " + std::to_string(given.data.size()) + " bytes, not what its shape and type need");
    }
  }
}

}  // namespace edgeopt

#endif  // EDGEOPT_CHECKS_HPP_
