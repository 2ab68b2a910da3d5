// Text in and out of the runner: types on the command line and in requests, JSON in answers.

#include <cmath>
#include <cstdio>
#include <sstream>

#include "program.hpp"

namespace edgeopt {
namespace {

DType parse_dtype(const std::string& name) {
  for (const DType dtype : {DType::kFloat32, DType::kFloat16, DType::kInt8, DType::kUInt8, DType::kInt16, DType::kInt32,
                            DType::kInt64, DType::kBool}) {
    if (name == name_of(dtype)) return dtype;
  }
  throw Error("'" + name + "' is no element type");
}

// Digits only: no sign, no spaces, at most 18 of them, so that the number fits.
std::int64_t parse_size(const std::string& text) {
  if (text.empty() || text.size() > 18 || text.find_first_not_of("0123456789") != std::string::npos) {
    throw Error("'" + text + "' is no size");
  }
  return std::stoll(text);
}

}  // namespace

TensorInfo parse_type(const std::string& text) {
  const std::size_t colon = text.find(':');
  if (colon == std::string::npos) throw Error("'" + text + "' is not TYPE:SIZES");
  TensorInfo info;
  info.dtype = parse_dtype(text.substr(0, colon));
  std::istringstream sizes(text.substr(colon + 1));
  for (std::string size; std::getline(sizes, size, ',');) info.shape.push_back(parse_size(size));
  elements_of(info.shape);
  return info;
}

std::string quoted(const std::string& text) {
  std::string out = "\"";
  for (const char letter : text) {
    const auto code = static_cast<unsigned char>(letter);
    if (letter == '"' || letter == '\\') {
      out += '\\';
      out += letter;
    } else if (code < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", code);
      out += escape;
    } else {
      out += letter;
    }
  }
  return out + "\"";
}

std::string json_of(double value) {
  char text[32];
  std::snprintf(text, sizeof text, "%.6f", std::isfinite(value) ? value : 0.0);
  return text;
}

std::string json_of(const Shape& shape) {
  std::string out = "[";
  for (const std::int64_t size : shape) {
    if (out.size() > 1) out += ", ";
    out += std::to_string(size);
  }
  return out + "]";
}

std::string json_of(const std::vector<TensorInfo>& infos) {
  std::string out = "[";
  for (const TensorInfo& info : infos) {
    if (out.size() > 1) out += ", ";
    out += "{\"name\": " + quoted(info.name) + ", \"dtype\": \"" + name_of(info.dtype) +
           "\", \"shape\": " + json_of(info.shape) + "}";
  }
  return out + "]";
}

}  // namespace edgeopt
