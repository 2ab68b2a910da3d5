// Restores a model file that was packed for download: C++17, nothing else.
//
//     std::vector<std::uint8_t> model = edgeopt::unpack(data, size);   // `data` is the content of model.*.packed
//
// Throws std::runtime_error when the data are damaged; what it returns has the SHA-256 of the file that was packed.
// Define EDGEOPT_UNPACK_ZLIB and link zlib (-lz; part of Android and iOS) for files that were packed with it.
// The layout is told in unpack.py.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <vector>
#ifdef EDGEOPT_UNPACK_ZLIB
#include <zlib.h>
#endif

namespace edgeopt {
namespace unpacking {

constexpr std::size_t kHeader = 56, kSegment = 12, kLargest = 1u << 20;

inline void require(bool condition, const char* message) {
  if (!condition) throw std::runtime_error(message);
}

inline std::uint64_t number(const std::uint8_t* bytes, int count) {
  std::uint64_t value = 0;
  while (count--) value = value << 8 | bytes[count];
  return value;
}

// FIPS 180-4; of a whole buffer.
inline std::array<std::uint8_t, 32> sha256(const std::vector<std::uint8_t>& data) {
  static const std::uint32_t kRound[64] = {
      0x428a2f98, 0x71374491, 0xb5c0fbcf, 0xe9b5dba5, 0x3956c25b, 0x59f111f1, 0x923f82a4, 0xab1c5ed5,
      0xd807aa98, 0x12835b01, 0x243185be, 0x550c7dc3, 0x72be5d74, 0x80deb1fe, 0x9bdc06a7, 0xc19bf174,
      0xe49b69c1, 0xefbe4786, 0x0fc19dc6, 0x240ca1cc, 0x2de92c6f, 0x4a7484aa, 0x5cb0a9dc, 0x76f988da,
      0x983e5152, 0xa831c66d, 0xb00327c8, 0xbf597fc7, 0xc6e00bf3, 0xd5a79147, 0x06ca6351, 0x14292967,
      0x27b70a85, 0x2e1b2138, 0x4d2c6dfc, 0x53380d13, 0x650a7354, 0x766a0abb, 0x81c2c92e, 0x92722c85,
      0xa2bfe8a1, 0xa81a664b, 0xc24b8b70, 0xc76c51a3, 0xd192e819, 0xd6990624, 0xf40e3585, 0x106aa070,
      0x19a4c116, 0x1e376c08, 0x2748774c, 0x34b0bcb5, 0x391c0cb3, 0x4ed8aa4a, 0x5b9cca4f, 0x682e6ff3,
      0x748f82ee, 0x78a5636f, 0x84c87814, 0x8cc70208, 0x90befffa, 0xa4506ceb, 0xbef9a3f7, 0xc67178f2};
  std::uint32_t h[8] = {0x6a09e667, 0xbb67ae85, 0x3c6ef372, 0xa54ff53a, 0x510e527f, 0x9b05688c, 0x1f83d9ab, 0x5be0cd19};
  const auto rotate = [](std::uint32_t x, int n) { return x >> n | x << (32 - n); };
  const std::size_t blocks = (data.size() + 8) / 64 + 1;
  for (std::size_t b = 0; b < blocks; ++b) {
    std::uint8_t block[64] = {};
    const std::size_t start = b * 64, left = start < data.size() ? data.size() - start : 0;
    if (left) std::memcpy(block, data.data() + start, left < 64 ? left : 64);
    if (left < 64 && start + left == data.size() && (left || start == data.size())) block[left] = 0x80;
    if (b + 1 == blocks)
      for (int i = 0; i < 8; ++i) block[56 + i] = std::uint8_t(std::uint64_t(data.size()) * 8 >> (56 - 8 * i));
    std::uint32_t w[64], v[8];
    for (int i = 0; i < 16; ++i)
      w[i] = std::uint32_t(block[4 * i]) << 24 | block[4 * i + 1] << 16 | block[4 * i + 2] << 8 | block[4 * i + 3];
    for (int i = 16; i < 64; ++i)
      w[i] = w[i - 16] + w[i - 7] + (rotate(w[i - 15], 7) ^ rotate(w[i - 15], 18) ^ w[i - 15] >> 3) +
             (rotate(w[i - 2], 17) ^ rotate(w[i - 2], 19) ^ w[i - 2] >> 10);
    std::memcpy(v, h, sizeof v);
    for (int i = 0; i < 64; ++i) {
      const std::uint32_t t1 = v[7] + (rotate(v[4], 6) ^ rotate(v[4], 11) ^ rotate(v[4], 25)) +
                               ((v[4] & v[5]) ^ (~v[4] & v[6])) + kRound[i] + w[i];
      const std::uint32_t t2 = (rotate(v[0], 2) ^ rotate(v[0], 13) ^ rotate(v[0], 22)) +
                               ((v[0] & v[1]) ^ (v[0] & v[2]) ^ (v[1] & v[2]));
      std::memmove(v + 1, v, 7 * sizeof *v);
      v[4] += t1;
      v[0] = t1 + t2;
    }
    for (int i = 0; i < 8; ++i) h[i] += v[i];
  }
  std::array<std::uint8_t, 32> digest;
  for (int i = 0; i < 32; ++i) digest[i] = std::uint8_t(h[i / 4] >> (24 - 8 * (i % 4)));
  return digest;
}

inline std::vector<std::uint8_t> inflate(const std::uint8_t* data, std::size_t size, std::size_t limit) {
#ifdef EDGEOPT_UNPACK_ZLIB
  std::vector<std::uint8_t> inflated(limit);
  uLongf length = uLongf(limit);
  require(::uncompress(inflated.data(), &length, data, uLong(size)) == Z_OK, "a segment that zlib can't read");
  inflated.resize(length);
  return inflated;
#else
  (void)data, (void)size, (void)limit;
  throw std::runtime_error("the file was packed with zlib: define EDGEOPT_UNPACK_ZLIB and link zlib");
#endif
}

// Writes the words of one segment that are not zero; `out` is all zero, `size` bytes.
inline void expand(const std::uint8_t* data, std::size_t stored, bool gaps, std::size_t word, std::size_t lead,
                   std::uint8_t* out, std::size_t size) {
  const char* message = "a segment with impossible sizes";
  const std::size_t words = (size - lead) / word, tail = (size - lead) % word;
  const std::size_t start = lead + (gaps ? 4 : 0);
  require(stored >= start, message);
  const std::size_t marks = gaps ? std::size_t(number(data + lead, 4)) : (words + 7) / 8;
  require(stored - start >= marks, message);
  std::vector<std::size_t> places;
  std::size_t place = 0;
  for (std::size_t i = 0; i < marks; ++i) {
    const std::uint8_t mark = data[start + i];
    if (!gaps) {
      for (int bit = 0; bit < 8; ++bit)
        if (mark >> bit & 1) places.push_back(8 * i + bit);
    } else if (mark == 255) {
      place += 255;
    } else {
      places.push_back(place += mark);
      ++place;
    }
  }
  const std::size_t count = places.size(), values = start + marks;
  require(stored == values + count * word + tail && (!count || places.back() < words), message);
  std::memcpy(out, data, lead);
  for (std::size_t i = 0; i < count; ++i)
    for (std::size_t byte = 0; byte < word; ++byte) out[lead + places[i] * word + byte] = data[values + byte * count + i];
  std::memcpy(out + size - tail, data + stored - tail, tail);
}

}  // namespace unpacking

inline std::vector<std::uint8_t> unpack(const std::uint8_t* data, std::size_t size) {
  using namespace unpacking;
  require(size >= kHeader && !std::memcmp(data, "EDGEPACK", 8), "not a packed model file");
  require(number(data + 8, 4) == 1, "another version of the format");
  const std::uint64_t count = number(data + 12, 4), total = number(data + 16, 8);
  std::vector<std::uint8_t> model;  // grows as segments prove real: a lying header can't make it large
  std::size_t at = kHeader;
  for (std::uint64_t i = 0; i < count; ++i) {
    require(size - at >= kSegment, "cut short");
    const std::uint8_t method = data[at], word = data[at + 1], lead = data[at + 2], deflated = data[at + 3];
    const std::size_t restored = std::size_t(number(data + at + 4, 4)), stored = std::size_t(number(data + at + 8, 4));
    at += kSegment;
    require(method < 3 && (word == 1 || word == 2 || word == 4) && lead < word && deflated < 2, "an unknown segment");
    require(lead <= restored && restored <= kLargest && stored <= restored, "a segment with impossible sizes");
    require(size - at >= stored, "cut short");
    std::vector<std::uint8_t> inflated;
    if (deflated) inflated = inflate(data + at, stored, 2 * restored + 8);
    const std::uint8_t* content = deflated ? inflated.data() : data + at;
    const std::size_t length = deflated ? inflated.size() : stored, before = model.size();
    model.resize(before + restored);
    if (method == 0) {
      require(length == restored, "a segment with impossible sizes");
      if (restored) std::memcpy(model.data() + before, content, restored);
    } else {
      expand(content, length, method == 2, word, lead, model.data() + before, restored);
    }
    at += stored;
  }
  require(at == size && model.size() == total, "another length than the header says");
  const auto digest = sha256(model);
  require(!std::memcmp(digest.data(), data + 24, 32), "restores to other bytes than were packed");
  return model;
}

}  // namespace edgeopt
