// SPDX-License-Identifier: Apache-2.0
#include "core/simd_avx2.h"
#include "pruning/pruning.h"

namespace lissom::pruning::avx2 {
namespace {

constexpr int kTileRows = 2;  // 8 sums in 16 registers

struct Bytes {
  __m256i lo, hi;
};
LISSOM_INLINE __m256i half(const uint8_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
LISSOM_INLINE Bytes load(const uint8_t* p) { return {half(p), half(p + 32)}; }
LISSOM_INLINE void store(uint8_t* p, Bytes v) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), v.lo);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32), v.hi);
}
LISSOM_INLINE Bytes larger(Bytes a, Bytes b) {
  return {_mm256_max_epu8(a.lo, b.lo), _mm256_max_epu8(a.hi, b.hi)};
}
LISSOM_INLINE Bytes smaller(Bytes a, Bytes b) {
  return {_mm256_min_epu8(a.lo, b.lo), _mm256_min_epu8(a.hi, b.hi)};
}
LISSOM_INLINE Bytes pick(Bytes a, Bytes b, Bytes yes, Bytes no) {
  const Bytes most = larger(a, b);
  return {_mm256_blendv_epi8(no.lo, yes.lo, _mm256_cmpeq_epi8(a.lo, most.lo)),
          _mm256_blendv_epi8(no.hi, yes.hi, _mm256_cmpeq_epi8(a.hi, most.hi))};
}

typedef __m256i Sum;
LISSOM_INLINE Sum sum_zero() { return _mm256_setzero_si256(); }
LISSOM_INLINE Sum sum_add(Sum sum, const uint8_t* a, const uint8_t* b) {
  sum = _mm256_add_epi64(sum, _mm256_sad_epu8(half(a), half(b)));
  return _mm256_add_epi64(sum, _mm256_sad_epu8(half(a + 32), half(b + 32)));
}
LISSOM_INLINE uint32_t sum_total(Sum sum) {
  const __m128i two = _mm_add_epi64(_mm256_castsi256_si128(sum), _mm256_extracti128_si256(sum, 1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_add_epi64(two, _mm_unpackhi_epi64(two, two))));
}

#include "pruning/cpu/pruning_kernels.inc"

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {thresholds, distances};

}  // namespace lissom::pruning::avx2
