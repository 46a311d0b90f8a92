// SPDX-License-Identifier: Apache-2.0
#include "core/simd_avx512.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24::avx512 {
namespace {

using namespace simd_avx512;

constexpr int64_t kTileRows = 8;   // tokens held in registers
constexpr int64_t kPanelPair = 2;  // panels held in registers
constexpr int64_t kLaneRows = 1;
constexpr int64_t kTokenBlock = 128;
constexpr int64_t kPrefetchAhead = 2048;  // bytes

#include "sparse24/cpu/sparse24_epilogue.inc"
#include "sparse24/cpu/sparse24_kernels.inc"

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {
    {&permuted::kPath<DType::f32>, &permuted::kPath<DType::bf16>, &permuted::kPath<DType::f16>},
    {&lanes::kPath<DType::f32>, &lanes::kPath<DType::bf16>, &lanes::kPath<DType::f16>},
    nullptr,
    nullptr};

}  // namespace lissom::sparse24::avx512
