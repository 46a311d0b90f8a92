// SPDX-License-Identifier: Apache-2.0
#include "core/simd_portable.h"
#include "pruning/pruning.h"

namespace lissom::pruning::portable {
namespace {

constexpr int kTileRows = 1;

typedef uint8_t Bytes __attribute__((vector_size(kRowStep)));
LISSOM_INLINE Bytes load(const uint8_t* p) {
  Bytes v;
  memcpy(&v, p, kRowStep);
  return v;
}
LISSOM_INLINE void store(uint8_t* p, Bytes v) { memcpy(p, &v, kRowStep); }
LISSOM_INLINE Bytes larger(Bytes a, Bytes b) { return a > b ? a : b; }
LISSOM_INLINE Bytes smaller(Bytes a, Bytes b) { return a > b ? b : a; }
LISSOM_INLINE Bytes pick(Bytes a, Bytes b, Bytes yes, Bytes no) { return a >= b ? yes : no; }

typedef uint32_t Sum;
LISSOM_INLINE Sum sum_zero() { return 0; }
// In the form that compilers know as a sum of absolute differences.
LISSOM_INLINE Sum sum_add(Sum sum, const uint8_t* a, const uint8_t* b) {
  for (int r = 0; r < kRowStep; ++r) {
    const int difference = a[r] - b[r];
    sum += static_cast<uint32_t>(difference < 0 ? -difference : difference);
  }
  return sum;
}
LISSOM_INLINE uint32_t sum_total(Sum sum) { return sum; }

#include "pruning/cpu/pruning_kernels.inc"

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {thresholds, distances};

}  // namespace lissom::pruning::portable
