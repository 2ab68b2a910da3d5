// From the numbers of an app to those of a model file and back: layout, quantization, element types. Plain C++17.

#ifndef EDGEOPT_VALUES_HPP_
#define EDGEOPT_VALUES_HPP_

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "edgeopt_model.hpp"

namespace edgeopt {

// Numbers in C order with their shape. Real numbers are float, also where the model computes in float16; truth values
// are std::uint8_t, 0 or 1.
template <typename T>
struct Array {
  Shape shape;
  std::vector<T> values;

  Array() = default;
  // All zeros.
  explicit Array(Shape sizes) : shape(std::move(sizes)), values(elements_of(shape)) {}
  // Throws Error where the number of values is not that of the shape.
  Array(Shape sizes, std::vector<T> numbers) : shape(std::move(sizes)), values(std::move(numbers)) {
    if (values.size() != elements_of(shape)) throw Error("an array has not as many values as its shape says");
  }
};

// How one tensor of the file maps to the app's array.
struct Mapping {
  std::string name;         // in the file
  DType file_dtype;         // in the file
  DType model_dtype;        // of the trained model
  Shape file_shape;         // kFree where any size goes
  std::vector<int> permutation;  // the model's dimensions in the file's order; empty where they are the same
  bool quantized;           // real = scale * (stored - zero_point)
  float scale;
  std::int32_t zero_point;
};

// IEEE 754 binary16, rounded half to even; what is too large becomes infinite.
inline std::uint16_t half_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  const auto sign = static_cast<std::uint16_t>(bits >> 16 & 0x8000u);
  const std::uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<std::uint16_t>(sign | 0x7e00u);  // not a number
  if (magnitude >= 0x477ff000u) return static_cast<std::uint16_t>(sign | 0x7c00u);
  if (magnitude < 0x38800000u) {  // below the smallest normal half: a multiple of 2^-24
    const float steps = std::nearbyint(std::fabs(value) * 16777216.0f);
    return static_cast<std::uint16_t>(sign | static_cast<std::uint16_t>(steps));
  }
  const std::uint32_t rounded = magnitude + 0x0fffu + (magnitude >> 13 & 1u);
  return static_cast<std::uint16_t>(sign | (rounded - 0x38000000u) >> 13);
}

inline float float_of_half(std::uint16_t half) {
  const std::uint32_t exponent = half >> 10 & 0x1fu, fraction = half & 0x3ffu;
  float magnitude;
  if (exponent == 0) {
    magnitude = static_cast<float>(fraction) / 16777216.0f;
  } else {
    const std::uint32_t wide = exponent == 31 ? 0xffu : exponent + 112u;
    const std::uint32_t bits = wide << 23 | fraction << 13;
    std::memcpy(&magnitude, &bits, sizeof magnitude);
  }
  return half & 0x8000u ? -magnitude : magnitude;
}

namespace values {

struct Half {
  std::uint16_t bits;
};

// Calls visit(k, place) for every element of an array of this shape: `place` is where it lies in the array, `k` where
// it lies in the array with its dimensions in that order.
template <typename Visit>
void for_each(const Shape& shape, const std::vector<int>& order, Visit visit) {
  const std::size_t rank = shape.size(), count = elements_of(shape);
  Shape strides(rank, 1), sizes(rank), steps(rank), index(rank, 0);
  for (std::size_t axis = rank; axis-- > 1;) strides[axis - 1] = strides[axis] * shape[axis];
  for (std::size_t axis = 0; axis < rank; ++axis) {
    const auto from = order.empty() ? axis : static_cast<std::size_t>(order[axis]);
    sizes[axis] = shape[from];
    steps[axis] = strides[from];
  }
  std::int64_t place = 0;
  for (std::size_t k = 0; k < count; ++k) {
    visit(k, static_cast<std::size_t>(place));
    for (std::size_t axis = rank; axis-- > 0;) {
      place += steps[axis];
      if (++index[axis] < sizes[axis]) break;
      place -= steps[axis] * sizes[axis];
      index[axis] = 0;
    }
  }
}

template <typename Stored>
Stored quantized(float value, float scale, std::int32_t zero_point) {
  using Limits = std::numeric_limits<Stored>;
  const float scaled = std::nearbyint(value / scale) + static_cast<float>(zero_point);  // half to even
  if (std::isnan(scaled)) return 0;
  if (scaled <= static_cast<float>(Limits::min())) return Limits::min();
  return scaled < static_cast<float>(Limits::max()) ? static_cast<Stored>(scaled) : Limits::max();
}

// The same number in another type. Throws Error where an integer doesn't fit.
template <typename To, typename From>
To converted(From value) {
  if constexpr (std::is_same_v<To, Half>) {
    return Half{half_of(static_cast<float>(value))};
  } else if constexpr (std::is_same_v<From, Half>) {
    return static_cast<To>(float_of_half(value.bits));
  } else {
    if constexpr (std::is_integral_v<To> && std::is_integral_v<From>) {
      const auto wide = static_cast<std::int64_t>(value);
      if (wide < static_cast<std::int64_t>(std::numeric_limits<To>::min()) ||
          wide > static_cast<std::int64_t>(std::numeric_limits<To>::max())) {
        throw Error("the number " + std::to_string(value) + " is too large for the model");
      }
    }
    return static_cast<To>(value);
  }
}

// A real number as precise as the trained model has it.
inline float as_trained(float value, const Mapping& mapping) {
  return mapping.model_dtype == DType::kFloat16 ? float_of_half(half_of(value)) : value;
}

template <typename Stored, typename Value>
Stored stored(Value value, const Mapping& mapping) {
  if constexpr (std::is_same_v<Value, float>) {
    const float real = as_trained(value, mapping);
    if constexpr (std::is_integral_v<Stored>) {
      if (mapping.quantized) return quantized<Stored>(real, mapping.scale, mapping.zero_point);
    }
    return converted<Stored>(real);
  } else {
    return converted<Stored>(value);
  }
}

template <typename Value, typename Stored>
Value loaded(Stored value, const Mapping& mapping) {
  if constexpr (std::is_same_v<Value, float>) {
    if constexpr (std::is_integral_v<Stored>) {
      if (mapping.quantized) {
        const auto centred = static_cast<double>(static_cast<std::int64_t>(value) - mapping.zero_point);
        return as_trained(static_cast<float>(centred * static_cast<double>(mapping.scale)), mapping);
      }
    }
    return as_trained(converted<float>(value), mapping);
  } else {
    return converted<Value>(value);
  }
}

// Calls visit with a value of the C++ type that stores a `dtype`.
template <typename Visit>
void with_stored_type(DType dtype, Visit visit) {
  switch (dtype) {
    case DType::kFloat32: return visit(float{});
    case DType::kFloat16: return visit(Half{});
    case DType::kInt8: return visit(std::int8_t{});
    case DType::kBool:
    case DType::kUInt8: return visit(std::uint8_t{});
    case DType::kInt16: return visit(std::int16_t{});
    case DType::kInt32: return visit(std::int32_t{});
    case DType::kInt64: return visit(std::int64_t{});
  }
}

inline std::string text_of(const Shape& shape) {
  std::string text;
  for (const std::int64_t size : shape) {
    text += (text.empty() ? "" : ", ") + (size == kFree ? "any" : std::to_string(size));
  }
  return "(" + text + ")";
}

// The file's shape in the model's order of dimensions.
inline Shape in_model_order(const Shape& shape, const std::vector<int>& permutation) {
  if (permutation.empty()) return shape;
  Shape ordered(shape.size());
  for (std::size_t axis = 0; axis < shape.size(); ++axis) {
    ordered[static_cast<std::size_t>(permutation[axis])] = shape[axis];
  }
  return ordered;
}

}  // namespace values

// An app's array as the file wants it: transposed, quantized or converted. Throws Error where it doesn't fit.
template <typename Value>
Tensor encode(const Array<Value>& array, const Mapping& mapping) {
  const Shape wanted = values::in_model_order(mapping.file_shape, mapping.permutation);
  bool fits = array.shape.size() == wanted.size();
  for (std::size_t axis = 0; fits && axis < wanted.size(); ++axis) {
    fits = wanted[axis] == kFree || wanted[axis] == array.shape[axis];
  }
  if (!fits) {
    throw Error("input '" + mapping.name + "' has the shape " + values::text_of(array.shape) + ", the model takes " +
                values::text_of(wanted));
  }
  if (array.values.size() != elements_of(array.shape)) {
    throw Error("input '" + mapping.name + "' has not as many values as its shape says");
  }
  Shape shape(array.shape);
  for (std::size_t axis = 0; axis < mapping.permutation.size(); ++axis) {
    shape[axis] = array.shape[static_cast<std::size_t>(mapping.permutation[axis])];
  }
  Tensor tensor = make_tensor(mapping.file_dtype, shape);
  values::with_stored_type(mapping.file_dtype, [&](auto example) {
    using Stored = decltype(example);
    auto* out = tensor.as<Stored>();
    values::for_each(array.shape, mapping.permutation, [&](std::size_t k, std::size_t place) {
      out[k] = values::stored<Stored>(array.values[place], mapping);
    });
  });
  return tensor;
}

// A tensor of the file as the app's array: dequantized or converted, transposed back. Throws Error where its type is
// not what was promised.
template <typename Value>
Array<Value> decode(const Tensor& tensor, const Mapping& mapping) {
  if (tensor.dtype != mapping.file_dtype || tensor.shape.size() != mapping.file_shape.size()) {
    throw Error("'" + mapping.name + "' is " + name_of(tensor.dtype) + " " + values::text_of(tensor.shape) +
                ", expected was " + name_of(mapping.file_dtype) + " " + values::text_of(mapping.file_shape));
  }
  Array<Value> array(values::in_model_order(tensor.shape, mapping.permutation));
  values::with_stored_type(mapping.file_dtype, [&](auto example) {
    using Stored = decltype(example);
    const auto* in = tensor.as<Stored>();
    values::for_each(array.shape, mapping.permutation, [&](std::size_t k, std::size_t place) {
      array.values[place] = values::loaded<Value>(in[k], mapping);
    });
  });
  return array;
}

// Which of the file's tensors has this name. Throws Error where none has.
inline std::size_t position_of(const std::vector<TensorInfo>& infos, const std::string& name) {
  for (std::size_t k = 0; k < infos.size(); ++k) {
    if (infos[k].name == name) return k;
  }
  throw Error("the file has no tensor '" + name + "'; is it the model that this code was made for?");
}

}  // namespace edgeopt

#endif  // EDGEOPT_VALUES_HPP_
