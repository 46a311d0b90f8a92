// SPDX-License-Identifier: Apache-2.0
#include "core/simd_avx512.h"
#include "pruning/pruning.h"

namespace lissom::pruning::avx512 {
namespace {

constexpr int kTileRows = 4;  // 16 sums in 32 registers

typedef __m512i Bytes;
LISSOM_INLINE Bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
LISSOM_INLINE void store(uint8_t* p, Bytes v) { _mm512_storeu_si512(p, v); }
LISSOM_INLINE Bytes larger(Bytes a, Bytes b) { return _mm512_max_epu8(a, b); }
LISSOM_INLINE Bytes smaller(Bytes a, Bytes b) { return _mm512_min_epu8(a, b); }
LISSOM_INLINE Bytes pick(Bytes a, Bytes b, Bytes yes, Bytes no) {
  return _mm512_mask_blend_epi8(_mm512_cmpge_epu8_mask(a, b), no, yes);
}

typedef __m512i Sum;
LISSOM_INLINE Sum sum_zero() { return _mm512_setzero_si512(); }
LISSOM_INLINE Sum sum_add(Sum sum, const uint8_t* a, const uint8_t* b) {
  return _mm512_add_epi64(sum, _mm512_sad_epu8(load(a), load(b)));
}
LISSOM_INLINE uint32_t sum_total(Sum sum) { return static_cast<uint32_t>(_mm512_reduce_add_epi64(sum)); }

#include "pruning/cpu/pruning_kernels.inc"

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {thresholds, distances};

}  // namespace lissom::pruning::avx512
