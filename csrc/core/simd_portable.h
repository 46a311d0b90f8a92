// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary, 16 lanes, in plain C++ (GCC/Clang vector extensions). The other simd_*.h offer the same names.
#pragma once

#include "core/types.h"

#define LISSOM_INLINE static inline __attribute__((always_inline))

namespace lissom::simd_portable {

typedef float vf __attribute__((vector_size(64)));     // 16 x float
typedef uint32_t vu __attribute__((vector_size(64)));  // 16 x uint32

LISSOM_INLINE vf vf_zero() { return vf{}; }
LISSOM_INLINE vf vf_set(float a) { return a - vf{}; }
LISSOM_INLINE vf vf_load(const float* p) {
  vf v;
  memcpy(&v, p, 64);
  return v;
}
LISSOM_INLINE void vf_store(float* p, vf v) { memcpy(p, &v, 64); }
LISSOM_INLINE vf vf_add(vf a, vf b) { return a + b; }
LISSOM_INLINE vf vf_sub(vf a, vf b) { return a - b; }
LISSOM_INLINE vf vf_mul(vf a, vf b) { return a * b; }
LISSOM_INLINE vf vf_div(vf a, vf b) { return a / b; }
LISSOM_INLINE vf vf_fma(vf a, vf b, vf c) { return a * b + c; }  // a*b + c
// Both return b where either is NaN, as the x86 instructions do.
LISSOM_INLINE vf vf_max(vf a, vf b) { return a > b ? a : b; }
LISSOM_INLINE vf vf_min(vf a, vf b) { return a < b ? a : b; }
LISSOM_INLINE vu vu_load(const void* p) {
  vu v;
  memcpy(&v, p, 64);
  return v;
}
LISSOM_INLINE void vu_store(void* p, vu v) { memcpy(p, &v, 64); }
LISSOM_INLINE vu vu_set(uint32_t a) { return a - vu{}; }
LISSOM_INLINE vu vu_shr(vu a, int n) { return a >> n; }
LISSOM_INLINE vu vu_shl(vu a, int n) { return a << n; }
LISSOM_INLINE vu vu_and(vu a, vu b) { return a & b; }
LISSOM_INLINE vu vu_or(vu a, vu b) { return a | b; }
LISSOM_INLINE vu vu_add(vu a, vu b) { return a + b; }
LISSOM_INLINE vf vf_bits(vu a) { return reinterpret_cast<vf>(a); }
LISSOM_INLINE vu vu_bits(vf a) { return reinterpret_cast<vu>(a); }
// A two-bit field of every lane, as an index for vf_pick4 (which may ignore or need its upper bits cleared).
LISSOM_INLINE vu vu_field2(vu a, int shift) { return (a >> shift) & 3u; }
// lane i: table[index[i]], index from vu_field2
LISSOM_INLINE vf vf_pick4(const float* table, vu index) {
  vf v;
  for (int i = 0; i < 16; ++i) v[i] = table[index[i]];
  return v;
}
LISSOM_INLINE vu vu_pick4(const uint32_t* table, vu index) {
  vu v;
  for (int i = 0; i < 16; ++i) v[i] = table[index[i]];
  return v;
}
// Low / high half-word of each lane, as bf16 or f16, widened.
LISSOM_INLINE vf vf_low_bf16(vu a) { return vf_bits(a << 16); }
LISSOM_INLINE vf vf_high_bf16(vu a) { return vf_bits(a & 0xffff0000u); }
LISSOM_INLINE vf vf_low_f16(vu a) {
  vf v;
  for (int i = 0; i < 16; ++i) v[i] = f16_to_float(static_cast<uint16_t>(a[i]));
  return v;
}
LISSOM_INLINE vf vf_high_f16(vu a) { return vf_low_f16(a >> 16); }
LISSOM_INLINE vf vf_load_bf16(const uint16_t* p) {
  vf v;
  for (int i = 0; i < 16; ++i) v[i] = bf16_to_float(p[i]);
  return v;
}
LISSOM_INLINE vf vf_load_f16(const uint16_t* p) {
  vf v;
  for (int i = 0; i < 16; ++i) v[i] = f16_to_float(p[i]);
  return v;
}
LISSOM_INLINE void vf_store_bf16(uint16_t* p, vf v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_bf16(v[i]);
}
LISSOM_INLINE void vf_store_f16(uint16_t* p, vf v) {
  for (int i = 0; i < 16; ++i) p[i] = float_to_f16(v[i]);
}
LISSOM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace lissom::simd_portable
