// SPDX-License-Identifier: Apache-2.0
// The vector vocabulary of simd_portable.h on AVX-512 (F, BW, VL, DQ): 16 lanes as one register.
#pragma once

#include <immintrin.h>

#include "core/types.h"

#define LISSOM_INLINE static inline __attribute__((always_inline))

namespace lissom::simd_avx512 {

typedef __m512 vf;
typedef __m512i vu;

LISSOM_INLINE vf vf_zero() { return _mm512_setzero_ps(); }
LISSOM_INLINE vf vf_set(float a) { return _mm512_set1_ps(a); }
LISSOM_INLINE vf vf_load(const float* p) { return _mm512_loadu_ps(p); }
LISSOM_INLINE void vf_store(float* p, vf v) { _mm512_storeu_ps(p, v); }
LISSOM_INLINE vf vf_add(vf a, vf b) { return _mm512_add_ps(a, b); }
LISSOM_INLINE vf vf_sub(vf a, vf b) { return _mm512_sub_ps(a, b); }
LISSOM_INLINE vf vf_mul(vf a, vf b) { return _mm512_mul_ps(a, b); }
LISSOM_INLINE vf vf_div(vf a, vf b) { return _mm512_div_ps(a, b); }
LISSOM_INLINE vf vf_fma(vf a, vf b, vf c) { return _mm512_fmadd_ps(a, b, c); }
LISSOM_INLINE vf vf_max(vf a, vf b) { return _mm512_max_ps(a, b); }
LISSOM_INLINE vf vf_min(vf a, vf b) { return _mm512_min_ps(a, b); }
LISSOM_INLINE vu vu_load(const void* p) { return _mm512_loadu_si512(p); }
LISSOM_INLINE void vu_store(void* p, vu v) { _mm512_storeu_si512(p, v); }
LISSOM_INLINE vu vu_set(uint32_t a) { return _mm512_set1_epi32(static_cast<int>(a)); }
LISSOM_INLINE vu vu_shr(vu a, int n) { return _mm512_srli_epi32(a, static_cast<unsigned>(n)); }
LISSOM_INLINE vu vu_shl(vu a, int n) { return _mm512_slli_epi32(a, static_cast<unsigned>(n)); }
LISSOM_INLINE vu vu_and(vu a, vu b) { return _mm512_and_si512(a, b); }
LISSOM_INLINE vu vu_or(vu a, vu b) { return _mm512_or_si512(a, b); }
LISSOM_INLINE vu vu_add(vu a, vu b) { return _mm512_add_epi32(a, b); }
LISSOM_INLINE vf vf_bits(vu a) { return _mm512_castsi512_ps(a); }
LISSOM_INLINE vu vu_bits(vf a) { return _mm512_castps_si512(a); }
LISSOM_INLINE vu vu_field2(vu a, int shift) { return vu_and(vu_shr(a, shift), vu_set(3)); }
// The table sits in the low 128 bits of the register. A cross-lane permute needs no broadcast of it: on Zen a 128-bit
// broadcast from memory takes a slot of the shuffle port. The price is the mask of the index, paid once per quad.
LISSOM_INLINE vf vf_pick4(const float* table, vu index) {
  return _mm512_permutexvar_ps(index, _mm512_castps128_ps512(_mm_loadu_ps(table)));
}
LISSOM_INLINE vu vu_pick4(const uint32_t* table, vu index) {
  return vu_bits(vf_pick4(reinterpret_cast<const float*>(table), index));
}
LISSOM_INLINE vf vf_low_bf16(vu a) { return vf_bits(_mm512_slli_epi32(a, 16)); }
LISSOM_INLINE vf vf_high_bf16(vu a) { return vf_bits(_mm512_and_si512(a, _mm512_set1_epi32(-65536))); }
LISSOM_INLINE vf vf_low_f16(vu a) { return _mm512_cvtph_ps(_mm512_cvtepi32_epi16(a)); }
LISSOM_INLINE vf vf_high_f16(vu a) { return vf_low_f16(_mm512_srli_epi32(a, 16)); }
LISSOM_INLINE vf vf_load_bf16(const uint16_t* p) {
  return vf_bits(
      _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))), 16));
}
LISSOM_INLINE vf vf_load_f16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
LISSOM_INLINE void vf_store_bf16(uint16_t* p, vf v) {
  const __m512i u = _mm512_castps_si512(v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(u, 16), _mm512_set1_epi32(1));
  __m512i r = _mm512_add_epi32(_mm512_add_epi32(u, _mm512_set1_epi32(0x7fff)), odd);
  r = _mm512_mask_or_epi32(r, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), u, _mm512_set1_epi32(0x400000));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_srli_epi32(r, 16)));
}
LISSOM_INLINE void vf_store_f16(uint16_t* p, vf v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT));
}
LISSOM_INLINE vf vf_from_int(vu a) { return _mm512_cvtepi32_ps(a); }
LISSOM_INLINE vu vu_from_integral(vf a) { return _mm512_cvttps_epi32(a); }
// The four bytes of a nibble's two positions, looked up by the low four bits of a lane.
LISSOM_INLINE vu pair_table() {
  uint32_t table[16];
  for (uint32_t nibble = 0; nibble < 16; ++nibble)
    table[nibble] = 0x01000100u + 0x0202u * (nibble & 3u) + 0x02020000u * (nibble >> 2);
  return vu_load(table);
}
LISSOM_INLINE vu vu_pair_index(vu meta, int shift) {
  return _mm512_permutexvar_epi32(vu_shr(meta, shift), pair_table());
}
LISSOM_INLINE vu vu_pick_pair(const int16_t* four, vu index) {
  long long bits;
  memcpy(&bits, four, 8);
  return _mm512_shuffle_epi8(_mm512_set1_epi64(bits), index);
}
LISSOM_INLINE vu widen_bytes(vu a, __m128i places) {  // to the upper half of an int16, then down
  return _mm512_srai_epi16(_mm512_shuffle_epi8(a, _mm512_broadcast_i32x4(places)), 8);
}
LISSOM_INLINE vu vu_low_bytes(vu a) {
  return widen_bytes(a, _mm_setr_epi8(-1, 0, -1, 1, -1, 4, -1, 5, -1, 8, -1, 9, -1, 12, -1, 13));
}
LISSOM_INLINE vu vu_high_bytes(vu a) {
  return widen_bytes(a, _mm_setr_epi8(-1, 2, -1, 3, -1, 6, -1, 7, -1, 10, -1, 11, -1, 14, -1, 15));
}
LISSOM_INLINE vu vu_madd(vu sum, vu a, vu b) { return vu_add(sum, _mm512_madd_epi16(a, b)); }
LISSOM_INLINE void vu_store_low_bytes(int8_t* p, vu a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a));
}
LISSOM_INLINE void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

}  // namespace lissom::simd_avx512
