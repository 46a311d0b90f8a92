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
LISSOM_INLINE vf vf_from_int(vu a) {
  typedef int32_t vi __attribute__((vector_size(64)));
  return __builtin_convertvector(reinterpret_cast<vi>(a), vf);
}
LISSOM_INLINE vu vu_from_integral(vf a) {
  typedef int32_t vi __attribute__((vector_size(64)));
  return reinterpret_cast<vu>(__builtin_convertvector(a, vi));
}
// Pairs of int16: lane i of vu_pick_pair holds the two of `four` that the nibble of index[i] names (index: from
// vu_pair_index), of vu_low_bytes and vu_high_bytes bytes 0, 1 and 2, 3 of a lane; vu_madd adds both products to a lane.
LISSOM_INLINE vu vu_pair_index(vu meta, int shift) { return (meta >> shift) & 15u; }
LISSOM_INLINE vu vu_pick_pair(const int16_t* four, vu index) {
  vu v;
  for (int i = 0; i < 16; ++i)
    v[i] = static_cast<uint16_t>(four[index[i] & 3u]) |
           static_cast<uint32_t>(static_cast<uint16_t>(four[index[i] >> 2])) << 16;
  return v;
}
LISSOM_INLINE vu vu_high_bytes(vu a) {
  typedef int16_t vs __attribute__((vector_size(64)));
  const vu spread = (a >> 8 & 0xff00u) | (a & 0xff000000u);
  return reinterpret_cast<vu>(reinterpret_cast<vs>(spread) >> 8);
}
LISSOM_INLINE vu vu_low_bytes(vu a) { return vu_high_bytes(a << 16); }
LISSOM_INLINE vu vu_madd(vu sum, vu a, vu b) {
  int16_t p[32], q[32];
  memcpy(p, &a, 64), memcpy(q, &b, 64);
  for (int i = 0; i < 16; ++i)
    sum[i] += static_cast<uint32_t>(p[2 * i] * q[2 * i] + p[2 * i + 1] * q[2 * i + 1]);
  return sum;
}
// The low byte of every lane, 16 bytes.
LISSOM_INLINE void vu_store_low_bytes(int8_t* p, vu a) {
  for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a[i]);
}
LISSOM_INLINE void prefetch(const void* p) { __builtin_prefetch(p); }

}  // namespace lissom::simd_portable
