// SPDX-License-Identifier: Apache-2.0
#include "core/simd_avx512.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24::avx512 {
namespace {

using namespace simd_avx512;

constexpr int64_t kTileRows = 8;          // permuted: tokens held in registers
constexpr int64_t kPanelPair = 2;         // permuted: panels held in registers
constexpr int kLaneSums = 8;              // lanes: vectors of sums held in registers
constexpr int kLaneVectors = 16;          // lanes: vectors of tokens in a tile
constexpr int64_t kTokenBlock = 128;      // permuted: tokens whose packed x stays in L2
constexpr int64_t kPrefetchAhead = 2048;  // bytes

// clang-format off: each builds on the one before
#include "sparse24/cpu/sparse24_epilogue.inc"
#include "sparse24/cpu/sparse24_tiling.inc"
#include "sparse24/cpu/sparse24_kernels.inc"
#include "sparse24/cpu/sparse24_int8.inc"
#include "sparse24/cpu/sparse24_quantize.inc"
// clang-format on

}  // namespace

extern const Kernels kKernels;
const Kernels kKernels = {{&permuted::kPath<DType::f32>, &permuted::kPath<DType::bf16>,
                           &permuted::kPath<DType::f16>, &permuted_int8::kPath},
                          {&lanes::kPath<DType::f32>, &lanes::kPath<DType::bf16>, &lanes::kPath<DType::f16>,
                           &lanes::kPath<DType::i8>},
                          {},
                          {},
                          quantize::rows};

}  // namespace lissom::sparse24::avx512
