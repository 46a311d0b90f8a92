// SPDX-License-Identifier: Apache-2.0
// Element types as plain integers with exact conversions. Torch-free, safe to include from every ISA unit.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(__CUDACC__)
#define LISSOM_HOST_DEVICE __host__ __device__
#else
#define LISSOM_HOST_DEVICE
#endif

namespace lissom {

enum class DType : int32_t { f32 = 0, bf16 = 1, f16 = 2, i8 = 3 };
constexpr int kTypeCount = 4;

LISSOM_HOST_DEVICE constexpr int64_t element_bytes(DType t) {
  return t == DType::f32 ? 4 : t == DType::i8 ? 1 : 2;
}

// `static`: every unit keeps its own copy, so that no unit compiled with wide ISA flags can lend its copy to another.
static inline uint32_t float_bits(float f) {
  uint32_t u;
  memcpy(&u, &f, 4);
  return u;
}

static inline float bits_float(uint32_t u) {
  float f;
  memcpy(&f, &u, 4);
  return f;
}

static inline float bf16_to_float(uint16_t h) { return bits_float(static_cast<uint32_t>(h) << 16); }

// Round to nearest even; NaN stays NaN (quiet bit set).
static inline uint16_t float_to_bf16(float f) {
  const uint32_t u = float_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((u >> 16) | 0x40u);
  return static_cast<uint16_t>((u + 0x7fffu + ((u >> 16) & 1u)) >> 16);
}

static inline float f16_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  const uint32_t rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return bits_float(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));  // inf, NaN
  // Exponent re-biased by a multiplication, which also normalises subnormals exactly.
  return bits_float(sign | float_bits(bits_float(rest << 13) * 0x1p112f));
}

static inline uint16_t float_to_f16(float f) {
  const uint32_t u = float_bits(f);
  const uint32_t sign = (u >> 16) & 0x8000u;
  const uint32_t rest = u & 0x7fffffffu;
  if (rest > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u | ((rest >> 13) & 0x3ffu));
  if (rest >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // >= 65520 rounds to inf
  if (rest < 0x38800000u) {  // result subnormal: one addition in float rounds at the right place
    const float r = bits_float(rest) + 0.5f;
    return static_cast<uint16_t>(sign | (float_bits(r) - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((rest + 0xc8000fffu + ((rest >> 13) & 1u)) >> 13));
}

}  // namespace lissom
