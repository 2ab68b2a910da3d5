// Decoded pictures -> pixels as the model takes them, to the bit as Pillow resamples: its filters widen when they
// shrink a picture, coefficients are 22-bit fixed-point numbers, and the first pass is rounded to 8 bits before the
// second. What Android, iOS or OpenCV call "bilinear" gives other pixels and costs accuracy. Plain C++17.

#ifndef EDGEOPT_IMAGE_HPP_
#define EDGEOPT_IMAGE_HPP_

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "edgeopt_model.hpp"

namespace edgeopt {

// A decoded picture that somebody else owns: upright (turn it by its EXIF orientation first), 8 bits a channel, pixels
// interleaved. `channels` is 1 (grey), 3 (RGB) or 4 (RGBA; alpha is ignored). `row_bytes` is the distance between rows
// in bytes; 0 where there is nothing between them.
struct Picture {
  const std::uint8_t* pixels;
  int width;
  int height;
  int channels;
  std::size_t row_bytes = 0;
};

enum class Filter { kNearest, kBilinear, kBicubic, kLanczos };

// What is done to a picture, in this order: to grey or RGB; if crop_fraction > 0, the central square of that fraction
// of the shorter side; if resize_shorter > 0, the shorter side scaled to that and the central width x height cut out,
// else resized to width x height; (pixel / rescale - mean) / std.
struct ImageSteps {
  int width;
  int height;
  int channels;
  double crop_fraction;
  int resize_shorter;
  Filter filter;
  bool columns_first;  // from Pillow 13 on, where it shrinks the height much more than the width
  bool channels_last;
  float rescale;
  std::vector<float> mean;  // one for all channels, or one each
  std::vector<float> std;
};

namespace image {

struct Pixels {
  int width, height, channels;
  std::vector<std::uint8_t> data;

  Pixels(int w, int h, int c)
      : width(w), height(h), channels(c),
        data(static_cast<std::size_t>(w) * static_cast<std::size_t>(h) * static_cast<std::size_t>(c)) {}

  std::size_t row() const { return static_cast<std::size_t>(width) * static_cast<std::size_t>(channels); }
  std::uint8_t* at(int y) { return data.data() + static_cast<std::size_t>(y) * row(); }
  const std::uint8_t* at(int y) const { return data.data() + static_cast<std::size_t>(y) * row(); }
};

// ITU-R 601 luma in 16-bit fixed point.
inline std::uint8_t grey(const std::uint8_t* rgb) {
  return static_cast<std::uint8_t>((rgb[0] * 19595u + rgb[1] * 38470u + rgb[2] * 7471u + 0x8000u) >> 16);
}

// A part of the picture in the model's number of channels; what lies outside of it is black.
inline Pixels cut(const Picture& picture, int left, int top, int width, int height, int channels) {
  Pixels out(width, height, channels);
  const auto step = static_cast<std::size_t>(picture.channels);
  const std::size_t row_bytes = picture.row_bytes ? picture.row_bytes : static_cast<std::size_t>(picture.width) * step;
  const int first = std::max(0, -left), last = std::min(width, picture.width - left);
  for (int y = std::max(0, -top); y < std::min(height, picture.height - top); ++y) {
    const std::uint8_t* row = picture.pixels + static_cast<std::size_t>(top + y) * row_bytes;
    const std::uint8_t* from = row + static_cast<std::size_t>(left + first) * step;
    std::uint8_t* to = out.at(y) + static_cast<std::size_t>(first) * static_cast<std::size_t>(channels);
    for (int x = first; x < last; ++x, from += step) {
      if (channels == 1) {
        *to++ = picture.channels == 1 ? *from : grey(from);
      } else {
        for (std::size_t c = 0; c < 3; ++c) *to++ = from[picture.channels == 1 ? 0 : c];
      }
    }
  }
  return out;
}

inline Pixels cut(const Pixels& pixels, int left, int top, int width, int height) {
  const Picture whole{pixels.data.data(), pixels.width, pixels.height, pixels.channels, 0};
  return cut(whole, left, top, width, height, pixels.channels);
}

// Half of what is left over, rounded half to even.
inline int margin(int whole, int part) {
  const int rest = whole - part, half = rest / 2;
  return rest % 2 ? half + half % 2 : half;
}

inline double sinc(double x) {
  if (x == 0.0) return 1.0;
  x *= 3.14159265358979323846;
  return std::sin(x) / x;
}

inline double weight(Filter filter, double x) {
  x = std::fabs(x);
  switch (filter) {
    case Filter::kBilinear: return x < 1.0 ? 1.0 - x : 0.0;
    case Filter::kBicubic:  // Keys' kernel with a = -1/2
      if (x < 1.0) return (1.5 * x - 2.5) * x * x + 1.0;
      return x < 2.0 ? (((x - 5.0) * x + 8.0) * x - 4.0) * -0.5 : 0.0;
    case Filter::kLanczos: return x < 3.0 ? sinc(x) * sinc(x / 3.0) : 0.0;
    case Filter::kNearest: break;
  }
  return 0.0;
}

// For every place of the result: the first place of the source that counts, and the coefficients from there on.
struct Coefficients {
  std::vector<int> first;
  std::vector<std::vector<std::int32_t>> values;
};

constexpr int kFractionBits = 22;

inline Coefficients coefficients(int from, int to, Filter filter) {
  const double scale = static_cast<double>(from) / to;
  const double stretch = std::max(scale, 1.0);  // shrinking, the filter covers all that is merged
  const double base = filter == Filter::kBilinear ? 1.0 : filter == Filter::kBicubic ? 2.0 : 3.0;
  const double support = base * stretch, squeeze = 1.0 / stretch;
  Coefficients made;
  std::vector<double> weights;
  for (int place = 0; place < to; ++place) {
    const double centre = (place + 0.5) * scale;
    const int first = std::max(0, static_cast<int>(centre - support + 0.5));
    const int last = std::min(from, static_cast<int>(centre + support + 0.5));
    weights.clear();
    double sum = 0.0;
    for (int k = first; k < last; ++k) {
      weights.push_back(weight(filter, (k - centre + 0.5) * squeeze));
      sum += weights.back();
    }
    std::vector<std::int32_t> fixed;
    for (double w : weights) {
      if (sum != 0.0) w /= sum;
      fixed.push_back(static_cast<std::int32_t>((w < 0 ? -0.5 : 0.5) + w * (1 << kFractionBits)));
    }
    made.first.push_back(first);
    made.values.push_back(std::move(fixed));
  }
  return made;
}

inline std::uint8_t clipped(std::int32_t sum) {
  return static_cast<std::uint8_t>(std::clamp(sum >> kFractionBits, 0, 255));
}

inline Pixels resize_rows(const Pixels& in, int width, Filter filter) {
  const Coefficients use = coefficients(in.width, width, filter);
  const auto channels = static_cast<std::size_t>(in.channels);
  Pixels out(width, in.height, in.channels);
  for (int y = 0; y < in.height; ++y) {
    std::uint8_t* to = out.at(y);
    for (std::size_t x = 0; x < use.values.size(); ++x) {
      const std::uint8_t* start = in.at(y) + static_cast<std::size_t>(use.first[x]) * channels;
      for (std::size_t c = 0; c < channels; ++c) {
        std::int32_t sum = 1 << (kFractionBits - 1);
        const std::uint8_t* from = start + c;
        for (const std::int32_t k : use.values[x]) {
          sum += *from * k;
          from += channels;
        }
        *to++ = clipped(sum);
      }
    }
  }
  return out;
}

inline Pixels resize_columns(const Pixels& in, int height, Filter filter) {
  const Coefficients use = coefficients(in.height, height, filter);
  Pixels out(in.width, height, in.channels);
  std::vector<std::int32_t> sums(in.row());
  for (int y = 0; y < height; ++y) {
    std::fill(sums.begin(), sums.end(), 1 << (kFractionBits - 1));
    int row = use.first[static_cast<std::size_t>(y)];
    for (const std::int32_t k : use.values[static_cast<std::size_t>(y)]) {
      const std::uint8_t* from = in.at(row++);
      for (std::size_t x = 0; x < sums.size(); ++x) sums[x] += from[x] * k;
    }
    std::transform(sums.begin(), sums.end(), out.at(y), clipped);
  }
  return out;
}

// Where each place of the result is taken from.
inline std::vector<int> nearest(int from, int to) {
  const double scale = static_cast<double>(from) / to;
  std::vector<int> places;
  double place = scale * 0.5;
  for (int k = 0; k < to; ++k, place += scale) places.push_back(static_cast<int>(place));
  return places;
}

inline Pixels resize_nearest(const Pixels& in, int width, int height) {
  const std::vector<int> columns = nearest(in.width, width), rows = nearest(in.height, height);
  const auto channels = static_cast<std::size_t>(in.channels);
  Pixels out(width, height, in.channels);
  for (int y = 0; y < height; ++y) {
    const int row = rows[static_cast<std::size_t>(y)];
    std::uint8_t* to = out.at(y);
    for (const int column : columns) {
      for (std::size_t c = 0; c < channels; ++c, ++to) {
        // Steps are added up, so the last may round to a place behind the end, which is black.
        const bool inside = row < in.height && column < in.width;
        *to = inside ? in.at(row)[static_cast<std::size_t>(column) * channels + c] : std::uint8_t{0};
      }
    }
  }
  return out;
}

inline Pixels resize(Pixels in, int width, int height, Filter filter, bool columns_first) {
  if (in.width == width && in.height == height) return in;
  if (filter == Filter::kNearest) return resize_nearest(in, width, height);
  // Pillow's own order of the two passes, which shows in the rounding.
  const int lower = in.height - height, narrower = in.width - width;
  const bool first = columns_first && lower > 0 && lower > 2 * narrower;
  if (first) in = resize_columns(in, height, filter);
  if (in.width != width) in = resize_rows(in, width, filter);
  if (in.height != height) in = resize_columns(in, height, filter);
  return in;
}

}  // namespace image

// The 8-bit pixels that are left after cropping and resizing. Throws Error where the picture makes no sense.
inline image::Pixels fit(const Picture& picture, const ImageSteps& steps) {
  if (picture.pixels == nullptr || picture.width < 1 || picture.height < 1) throw Error("the picture is empty");
  if (picture.channels != 1 && picture.channels != 3 && picture.channels != 4) {
    throw Error("the picture has " + std::to_string(picture.channels) + " channels, not 1, 3 or 4");
  }
  int left = 0, top = 0, width = picture.width, height = picture.height;
  if (steps.crop_fraction > 0) {
    const int side = std::max(1, static_cast<int>(steps.crop_fraction * std::min(width, height)));
    left = image::margin(width, side);
    top = image::margin(height, side);
    width = height = side;
  }
  image::Pixels pixels = image::cut(picture, left, top, width, height, steps.channels);
  if (steps.resize_shorter == 0) {
    return image::resize(std::move(pixels), steps.width, steps.height, steps.filter, steps.columns_first);
  }
  const std::int64_t shorter = steps.resize_shorter;
  const auto longer = [shorter](int side, int other) {
    return std::max(1, static_cast<int>(static_cast<double>(shorter * side) / other));
  };
  const int wide = width <= height ? steps.resize_shorter : longer(width, height);
  const int high = width <= height ? longer(height, width) : steps.resize_shorter;
  pixels = image::resize(std::move(pixels), wide, high, steps.filter, steps.columns_first);
  left = image::margin(wide, steps.width);
  top = image::margin(high, steps.height);
  return image::cut(pixels, left, top, steps.width, steps.height);
}

// The numbers that the model takes, one picture: channels x height x width, or height x width x channels.
inline std::vector<float> numbers_of(const Picture& picture, const ImageSteps& steps) {
  const image::Pixels pixels = fit(picture, steps);
  const auto channels = static_cast<std::size_t>(pixels.channels);
  const std::size_t plane = pixels.data.size() / channels;
  std::vector<float> numbers(pixels.data.size());
  for (std::size_t c = 0; c < channels; ++c) {
    const float mean = steps.mean[steps.mean.size() == 1 ? 0 : c], std = steps.std[steps.std.size() == 1 ? 0 : c];
    for (std::size_t k = 0; k < plane; ++k) {
      const float value = (static_cast<float>(pixels.data[k * channels + c]) / steps.rescale - mean) / std;
      numbers[steps.channels_last ? k * channels + c : c * plane + k] = value;
    }
  }
  return numbers;
}

}  // namespace edgeopt

#endif  // EDGEOPT_IMAGE_HPP_
