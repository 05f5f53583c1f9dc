// Half precision in memory, float in arithmetic. A value is rounded once, where it is stored, as torch
// and numpy round it.

#pragma once

#include <cstdint>
#include <cstring>

namespace effx {

struct Float16 {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

template <class To, class From>
inline To bit_cast(From from) {
  To to;
  static_assert(sizeof(to) == sizeof(from), "a bit cast keeps the size");
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

inline float load(const float* p) { return *p; }
inline double load(const double* p) { return *p; }
inline float load(const BFloat16* p) { return bit_cast<float>(uint32_t(p->bits) << 16); }

// Exponents are moved by exact multiplications, without a branch, so that the loop is vectorised.
inline float load(const Float16* p) {
  const uint32_t sign = uint32_t(p->bits & 0x8000) << 16;
  const uint32_t magnitude = p->bits & 0x7fff;
  const float normal = bit_cast<float>((magnitude << 13) + 0x70000000u) * 0x1p-112f;
  const float subnormal = bit_cast<float>(magnitude | 0x3f000000u) - 0.5f;
  const uint32_t value = bit_cast<uint32_t>(magnitude < 0x0400 ? subnormal : normal);
  return bit_cast<float>(sign | value);
}

inline void store(float* p, float value) { *p = value; }
inline void store(double* p, double value) { *p = value; }

inline void store(BFloat16* p, float value) {  // to the nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
  p->bits = uint16_t(value != value ? 0x7fc0u : rounded);
}

inline void store(Float16* p, float value) {  // to the nearest, ties to even
  const uint32_t bits = bit_cast<uint32_t>(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Adding 2^(13 + e) to a value of exponent e, at least that of the smallest normal number, leaves
  // the ten bits to keep at the end of the sum's significand, rounded by the addition itself.
  const uint32_t own_exponent = magnitude & 0x7f800000u;
  const uint32_t exponent = own_exponent < 0x38800000u ? 0x38800000u : own_exponent;
  const uint32_t added = exponent + 0x06800000u;
  const uint32_t kept = bit_cast<uint32_t>(bit_cast<float>(magnitude) + bit_cast<float>(added)) - added;
  const uint32_t finite = ((exponent - 0x38800000u) >> 13) + kept;
  const uint32_t special = magnitude > 0x7f800000u ? 0x7e00u : 0x7c00u;
  p->bits = uint16_t(sign | (magnitude >= 0x47800000u ? special : finite));
}

}  // namespace effx
