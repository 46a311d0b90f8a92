// SPDX-License-Identifier: Apache-2.0
#include "sparse24/cuda/mask_mm.cuh"

#include "sparse24/cuda/launch.h"

using namespace lissom;
using namespace lissom::sparse24;

extern "C" int lissom_sparse24_mask_mm(DType dtype, const void* dy, int64_t dy_stride, const void* x,
                                       int64_t x_stride, const uint8_t* meta, void* values, int64_t m,
                                       int64_t n, int64_t k, void* stream) {
  if (n == 0 || k == 0) return 0;
  if (element_bytes(dtype) != 2 || dy_stride % 8 || x_stride % 8) return kWrongArgument;
  const int64_t tiles =
      (n + MaskMm::kRows - 1) / MaskMm::kRows * ((k + MaskMm::kColumns - 1) / MaskMm::kColumns);
  const auto kernel = dtype == DType::bf16 ? mask_mm_kernel<dev::bf16> : mask_mm_kernel<dev::f16>;
  return dev::launch(kernel, {tiles}, MaskMm::kThreads, MaskMm::kSharedBytes, stream,
                     dense::Matrix{static_cast<const uint16_t*>(dy), m, n, dy_stride},
                     dense::Matrix{static_cast<const uint16_t*>(x), m, k, x_stride}, meta,
                     static_cast<uint16_t*>(values));
}
