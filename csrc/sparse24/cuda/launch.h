// SPDX-License-Identifier: Apache-2.0
// The launchers, plain C: all that the torch side knows of the kernels. Each starts its kernels on `stream` (a cudaStream_t) and
// returns a CUDA error code at once, 0 for none; none allocates or waits. Matrices are row-major and contiguous, their first
// element lies on 16 bytes, sizes are in elements; with nothing to do, nothing is started.
#pragma once

#include <stdint.h>

#include "core/types.h"

namespace lissom::sparse24 {
constexpr int kWrongArgument = 1;  // cudaErrorInvalidValue
}

extern "C" {

// --- canonical form (format.cu). Values are moved as bit patterns of `bytes` (1, 2 or 4) each ---

// Is w [n, k] 2:4? verdict [4]: 1 or 0, first bad row and quad (-1: none), its non-zeros. scratch [8 n] bytes.
int lissom_sparse24_check(const void* w, int64_t n, int64_t k, int bytes, void* scratch, int64_t* verdict,
                          void* stream);
// Is every nibble of meta legal? verdict [4] as above, with the nibble at the end. scratch [8 n] bytes.
int lissom_sparse24_check_meta(const uint8_t* meta, int64_t n, int64_t k, void* scratch, int64_t* verdict,
                               void* stream);
// keep_largest: 1 keeps the two largest of each quad; 0 wants a w that has been checked.
int lissom_sparse24_compress(const void* w, void* values, uint8_t* meta, int64_t n, int64_t k, int bytes,
                             int keep_largest, void* stream);
int lissom_sparse24_decompress(const void* values, const uint8_t* meta, void* w, int64_t n, int64_t k,
                               int bytes, void* stream);
// values [n, k/2] = dense [n, k] at the kept positions.
int lissom_sparse24_gather(const void* dense, const uint8_t* meta, void* values, int64_t n, int64_t k,
                           int bytes, void* stream);

// --- sm80-v1 (pack.cu); dtype as in its header: 1 bf16, 2 f16, 3 int8 ---

// An illegal nibble is packed as 0xE with NaN for its values (int8: zero).
int lissom_sparse24_pack(const void* values, const uint8_t* meta, void* packed, int64_t n, int64_t k,
                         int dtype, void* stream);
int lissom_sparse24_unpack(const void* packed, void* values, uint8_t* meta, int64_t n, int64_t k, int dtype,
                           void* stream);

// --- gradients (mask_mm.cu, grad_input.cu), bf16 or f16 ---

// values [n, k/2] = (dy^T x) at the kept positions; dy [m, n] and x [m, k] with row strides that are multiples of 8. NaN where
// a nibble of meta is illegal.
int lissom_sparse24_mask_mm(lissom::DType dtype, const void* dy, int64_t dy_stride, const void* x,
                            int64_t x_stride, const uint8_t* meta, void* values, int64_t m, int64_t n,
                            int64_t k, void* stream);
// dx [m, k] = dy [m, n] W; `records` is W [n, k] in sm80-v1 behind its header, the row stride of dy a multiple of 8. A block makes
// tile_rows (64 or 128) rows of dx.
int lissom_sparse24_grad_input(lissom::DType dtype, int tile_rows, const void* dy, int64_t dy_stride,
                               const void* records, void* dx, int64_t m, int64_t n, int64_t k, void* stream);

// --- forward (gemm.cu, gemv.cu): y [m, n] = act(x W^T + bias) + residual ---

typedef struct {
  int64_t m, n, k;
  int32_t dtype;  // of x and W: bf16, f16 or i8
  int32_t out;    // of y and residual: float32, or 16 bits (as dtype; either one for int8)
  int32_t act;    // Act of sparse24.h
  int32_t bias_dtype;
  const void* x;         // [m, k]; gemm: rows on 16 bytes; gemv: on 8
  int64_t x_stride;      // in elements, between rows
  const void* records;   // W in sm80-v1 behind its header
  const void* bias;      // [n] or null
  const void* residual;  // [m, n] or null
  int64_t residual_stride;
  const float* scale_w;  // int8: [n], and null otherwise
  const float* scale_x;  // int8: [m]
  void* y;               // [m, n]
} LissomLinear;

// Tile: an index of kTiles (tiles.h). splits > 1 divides k among that many blocks, whose partial sums a second kernel adds in
// order; it needs lissom_sparse24_gemm_workspace() bytes at `workspace`, on 16 bytes, which no other stream may use meanwhile.
int lissom_sparse24_gemm(const LissomLinear* linear, int tile, int splits, void* workspace,
                         int64_t workspace_bytes, void* stream);
int64_t lissom_sparse24_gemm_workspace(int64_t m, int64_t n, int splits);
// m <= kGemvTokens, 16-bit types: reads W at the speed of memory, without tensor cores.
int lissom_sparse24_gemv(const LissomLinear* linear, void* stream);
}
