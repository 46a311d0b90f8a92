// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of simd_portable.h on AVX2 + FMA + F16C: 16 lanes as two 256-bit halves.
#pragma once

#include <immintrin.h>

#include "core/types.h"

#define LISSOM_INLINE static inline __attribute__((always_inline))

namespace lissom::simd_avx2 {

struct vf {
  __m256 lo, hi;
};
struct vu {
  __m256i lo, hi;
};

LISSOM_INLINE vf vf_zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
LISSOM_INLINE vf vf_set(float a) { return {_mm256_set1_ps(a), _mm256_set1_ps(a)}; }
LISSOM_INLINE vf vf_load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
LISSOM_INLINE void vf_store(float* p, vf v) {
  _mm256_storeu_ps(p, v.lo);
  _mm256_storeu_ps(p + 8, v.hi);
}
LISSOM_INLINE vf vf_add(vf a, vf b) { return {_mm256_add_ps(a.lo, b.lo), _mm256_add_ps(a.hi, b.hi)}; }
LISSOM_INLINE vf vf_sub(vf a, vf b) { return {_mm256_sub_ps(a.lo, b.lo), _mm256_sub_ps(a.hi, b.hi)}; }
LISSOM_INLINE vf vf_mul(vf a, vf b) { return {_mm256_mul_ps(a.lo, b.lo), _mm256_mul_ps(a.hi, b.hi)}; }
LISSOM_INLINE vf vf_div(vf a, vf b) { return {_mm256_div_ps(a.lo, b.lo), _mm256_div_ps(a.hi, b.hi)}; }
LISSOM_INLINE vf vf_fma(vf a, vf b, vf c) {
  return {_mm256_fmadd_ps(a.lo, b.lo, c.lo), _mm256_fmadd_ps(a.hi, b.hi, c.hi)};
}
LISSOM_INLINE vf vf_max(vf a, vf b) { return {_mm256_max_ps(a.lo, b.lo), _mm256_max_ps(a.hi, b.hi)}; }
LISSOM_INLINE vf vf_min(vf a, vf b) { return {_mm256_min_ps(a.lo, b.lo), _mm256_min_ps(a.hi, b.hi)}; }
LISSOM_INLINE vu vu_load(const void* p) {
  const __m256i* q = static_cast<const __m256i*>(p);
  return {_mm256_loadu_si256(q), _mm256_loadu_si256(q + 1)};
}
LISSOM_INLINE void vu_store(void* p, vu v) {
  _mm256_storeu_si256(static_cast<__m256i*>(p), v.lo);
  _mm256_storeu_si256(static_cast<__m256i*>(p) + 1, v.hi);
}
LISSOM_INLINE vu vu_set(uint32_t a) {
  const __m256i v = _mm256_set1_epi32(static_cast<int>(a));
  return {v, v};
}
LISSOM_INLINE vu vu_shr(vu a, int n) {
  const __m128i c = _mm_cvtsi32_si128(n);
  return {_mm256_srl_epi32(a.lo, c), _mm256_srl_epi32(a.hi, c)};
}
LISSOM_INLINE vu vu_shl(vu a, int n) {
  const __m128i c = _mm_cvtsi32_si128(n);
  return {_mm256_sll_epi32(a.lo, c), _mm256_sll_epi32(a.hi, c)};
}
LISSOM_INLINE vu vu_and(vu a, vu b) { return {_mm256_and_si256(a.lo, b.lo), _mm256_and_si256(a.hi, b.hi)}; }
LISSOM_INLINE vu vu_or(vu a, vu b) { return {_mm256_or_si256(a.lo, b.lo), _mm256_or_si256(a.hi, b.hi)}; }
LISSOM_INLINE vu vu_add(vu a, vu b) { return {_mm256_add_epi32(a.lo, b.lo), _mm256_add_epi32(a.hi, b.hi)}; }
LISSOM_INLINE vf vf_bits(vu a) { return {_mm256_castsi256_ps(a.lo), _mm256_castsi256_ps(a.hi)}; }
LISSOM_INLINE vu vu_bits(vf a) { return {_mm256_castps_si256(a.lo), _mm256_castps_si256(a.hi)}; }
LISSOM_INLINE vu vu_field2(vu a, int shift) { return vu_shr(a, shift); }
// vpermilps reads two index bits of each lane, so the table is repeated in both 128-bit halves and no mask is needed.
LISSOM_INLINE vf vf_pick4(const float* table, vu index) {
  const __m256 t = _mm256_broadcast_ps(reinterpret_cast<const __m128*>(table));
  return {_mm256_permutevar_ps(t, index.lo), _mm256_permutevar_ps(t, index.hi)};
}
LISSOM_INLINE vu vu_pick4(const uint32_t* table, vu index) {
  return vu_bits(vf_pick4(reinterpret_cast<const float*>(table), index));
}
LISSOM_INLINE vf vf_low_bf16(vu a) { return vf_bits(vu_shl(a, 16)); }
LISSOM_INLINE vf vf_high_bf16(vu a) { return vf_bits(vu_and(a, vu_set(0xffff0000u))); }
// Half-words at even places to f16, widened: pack the low halves of 8 lanes into 128 bits first.
LISSOM_INLINE __m256 widen_low_f16(__m256i a) {
  const __m256i low = _mm256_and_si256(a, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(low, low), 0x08);
  return _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
}
LISSOM_INLINE vf vf_low_f16(vu a) { return {widen_low_f16(a.lo), widen_low_f16(a.hi)}; }
LISSOM_INLINE vf vf_high_f16(vu a) { return vf_low_f16(vu_shr(a, 16)); }
LISSOM_INLINE __m128i load_half(const uint16_t* p) {
  return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
}
LISSOM_INLINE vf vf_load_bf16(const uint16_t* p) {
  return vf_bits(vu_shl({_mm256_cvtepu16_epi32(load_half(p)), _mm256_cvtepu16_epi32(load_half(p + 8))}, 16));
}
LISSOM_INLINE vf vf_load_f16(const uint16_t* p) {
  return {_mm256_cvtph_ps(load_half(p)), _mm256_cvtph_ps(load_half(p + 8))};
}
LISSOM_INLINE __m128i narrow_bf16(__m256 v) {
  const __m256i u = _mm256_castps_si256(v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(u, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(u, _mm256_set1_epi32(0x7fff)), odd);
  const __m256i quiet = _mm256_or_si256(u, _mm256_set1_epi32(0x400000));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(v, v, _CMP_UNORD_Q));
  const __m256i h = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, quiet, nan), 16);
  return _mm256_castsi256_si128(_mm256_permute4x64_epi64(_mm256_packus_epi32(h, h), 0x08));
}
LISSOM_INLINE void vf_store_bf16(uint16_t* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), narrow_bf16(v.lo));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), narrow_bf16(v.hi));
}
LISSOM_INLINE void vf_store_f16(uint16_t* p, vf v) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(v.lo, _MM_FROUND_TO_NEAREST_INT));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p + 8), _mm256_cvtps_ph(v.hi, _MM_FROUND_TO_NEAREST_INT));
}
LISSOM_INLINE vf vf_from_int(vu a) { return {_mm256_cvtepi32_ps(a.lo), _mm256_cvtepi32_ps(a.hi)}; }
LISSOM_INLINE vu vu_from_integral(vf a) { return {_mm256_cvttps_epi32(a.lo), _mm256_cvttps_epi32(a.hi)}; }
// The bytes of both positions, by a multiplication: p * 0x0202 + 0x0100 = (2p, 2p + 1).
LISSOM_INLINE __m256i pair_bytes(__m256i nibble) {
  const __m256i both =
      _mm256_or_si256(_mm256_and_si256(nibble, _mm256_set1_epi32(3)),
                      _mm256_and_si256(_mm256_slli_epi32(nibble, 14), _mm256_set1_epi32(0x30000)));
  return _mm256_add_epi16(_mm256_mullo_epi16(both, _mm256_set1_epi16(0x0202)), _mm256_set1_epi16(0x0100));
}
LISSOM_INLINE vu vu_pair_index(vu meta, int shift) {
  const vu nibble = vu_shr(meta, shift);
  return {pair_bytes(nibble.lo), pair_bytes(nibble.hi)};
}
LISSOM_INLINE vu vu_pick_pair(const int16_t* four, vu index) {
  long long bits;
  memcpy(&bits, four, 8);
  const __m256i all = _mm256_set1_epi64x(bits);
  return {_mm256_shuffle_epi8(all, index.lo), _mm256_shuffle_epi8(all, index.hi)};
}
LISSOM_INLINE __m256i widen_bytes(__m256i a, __m128i places) {  // to the upper half of an int16, then down
  return _mm256_srai_epi16(_mm256_shuffle_epi8(a, _mm256_broadcastsi128_si256(places)), 8);
}
LISSOM_INLINE vu vu_low_bytes(vu a) {
  const __m128i places = _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13);
  return {widen_bytes(a.lo, places), widen_bytes(a.hi, places)};
}
LISSOM_INLINE vu vu_high_bytes(vu a) {
  const __m128i places = _mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15);
  return {widen_bytes(a.lo, places), widen_bytes(a.hi, places)};
}
LISSOM_INLINE vu vu_madd(vu sum, vu a, vu b) {
  return vu_add(sum, {_mm256_madd_epi16(a.lo, b.lo), _mm256_madd_epi16(a.hi, b.hi)});
}
LISSOM_INLINE void vu_store_low_bytes(int8_t* p, vu a) {
  const __m256i places =
      _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i lo = _mm256_shuffle_epi8(a.lo, places), hi = _mm256_shuffle_epi8(a.hi, places);
  const __m256i fours = _mm256_unpacklo_epi32(lo, hi);  // dwords: lanes 0-3 and 8-11, then 4-7 and 12-15
  const __m128i low = _mm256_castsi256_si128(fours), high = _mm256_extracti128_si256(fours, 1);
  const __m128i all = _mm_unpacklo_epi32(low, high);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), all);
}
LISSOM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace lissom::simd_avx2
