// SPDX-License-Identifier: Apache-2.0
// From sums to y = act(sum + bias) + residual, in float, rounded once. int8 sums are scaled first, by row of W and by token.
#pragma once

#include "core/cuda/dev.cuh"
#include "sparse24/cuda/launch.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24 {

// One linear layer as the kernels get it. `splits` blocks share the k steps of a tile and leave their sums in `partial`
// [splits][m][32 * panels] (float, or int for int8), which a second kernel adds in order.
struct Work {
  LissomLinear p;
  int64_t panels, records;
  int32_t splits;
  bool wide_y, wide_residual;  // allow 16-byte accesses
  void* partial;
};

// --- host: what a launcher checks and derives ---

inline bool aligned(const void* p, int64_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }

// `row_bytes`: what the rows of x must lie on.
inline bool valid(const LissomLinear& p, int64_t row_bytes) {
  const auto is = [](int32_t code, DType t) { return code == static_cast<int32_t>(t); };
  const bool int8 = is(p.dtype, DType::i8);
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.k % 4 != 0) return false;
  if (!int8 && !is(p.dtype, DType::bf16) && !is(p.dtype, DType::f16)) return false;
  if (!is(p.out, DType::f32) && !is(p.out, DType::bf16) && !is(p.out, DType::f16)) return false;
  if (!int8 && p.out != p.dtype && !is(p.out, DType::f32)) return false;
  if (int8 != (p.scale_w != nullptr) || int8 != (p.scale_x != nullptr)) return false;
  return aligned(p.x, row_bytes) && p.x_stride * (int8 ? 1 : 2) % row_bytes == 0 && aligned(p.records, 16);
}

inline Work work_of(const LissomLinear& p, int splits, void* partial) {
  const int64_t out = element_bytes(static_cast<DType>(p.out));
  Work w = {p,      sm80::panels(p.n), sm80::records(p.k, sm80::element_bytes(p.dtype)), splits, false, false,
            partial};
  w.wide_y = aligned(p.y, 16) && p.n * out % 16 == 0;
  w.wide_residual = aligned(p.residual, 16) && p.residual_stride * out % 16 == 0;
  return w;
}

// --- device ---

LISSOM_DEVICE float read_as(int dtype, const void* p, int64_t i) {
  switch (static_cast<DType>(dtype)) {
    case DType::f32: return dev::load(static_cast<const float*>(p) + i);
    case DType::bf16: return dev::to_float(dev::load(static_cast<const dev::bf16*>(p) + i));
    case DType::f16: return dev::to_float(dev::load(static_cast<const dev::f16*>(p) + i));
    case DType::i8: break;
  }
  return 0.0f;
}
// What a row of W adds to its sums, and what scales them; `row` may lie in the padding.
LISSOM_DEVICE float bias_of(const Work& w, int64_t row) {
  return w.p.bias && row < w.p.n ? read_as(w.p.bias_dtype, w.p.bias, row) : 0.0f;
}
LISSOM_DEVICE float scale_of(const Work& w, int64_t row) {
  return w.p.scale_w && row < w.p.n ? dev::load(w.p.scale_w + row) : 0.0f;
}
LISSOM_DEVICE float token_scale_of(const Work& w, int64_t token) {
  return w.p.scale_x ? dev::load(w.p.scale_x + token) : 0.0f;
}
// The sum as a number, with the bias; only int8 has a scale.
LISSOM_DEVICE float affine(float sum, float, float bias) { return sum + bias; }
LISSOM_DEVICE float affine(int sum, float scale, float bias) {
  return dev::fma(static_cast<float>(sum), scale, bias);
}

template <int Count>
LISSOM_DEVICE void activate(float (&v)[Count], int act) {
  switch (static_cast<Act>(act)) {
    case Act::none: return;
    case Act::relu:
      LISSOM_UNROLL
      for (float& x : v) x = x < 0.0f ? 0.0f : x;  // keeps NaN
      return;
    case Act::silu:
      LISSOM_UNROLL
      for (float& x : v) x = x * dev::rcp(1.0f + dev::exp(-x));
      return;
    case Act::gelu:
      LISSOM_UNROLL
      for (float& x : v) x = 0.5f * x * (1.0f + dev::erf(x * 0.70710678f));
      return;
    case Act::gelu_tanh:
      LISSOM_UNROLL
      for (float& x : v)  // 0.5 (1 + tanh u) = 1 / (1 + e^-2u)
        x = x * dev::rcp(1.0f + dev::exp(-1.5957691216f * dev::fma(0.044715f * x, x * x, x)));
      return;
  }
}

// y[token, row .. row + Count) from sums with their bias; rows from n on do not exist.
template <class Out, int Count>
LISSOM_DEVICE void finish(const Work& w, int64_t token, int64_t row, float (&v)[Count]) {
  using Piece = dev::Vec<Out, Count>;
  const LissomLinear& p = w.p;
  const int64_t valid = p.n - row;
  if (valid <= 0) return;
  activate(v, p.act);
  Piece piece;
  if (p.residual) {
    const Out* from = static_cast<const Out*>(p.residual) + token * p.residual_stride + row;
    if (w.wide_residual && valid >= Count) {
      piece = dev::load(reinterpret_cast<const Piece*>(from));
      LISSOM_UNROLL for (int i = 0; i < Count; ++i) v[i] += dev::to_float(piece[i]);
    } else {
      LISSOM_UNROLL for (int i = 0; i < Count; ++i) if (i < valid) v[i] += dev::to_float(dev::load(from + i));
    }
  }
  Out* y = static_cast<Out*>(p.y) + token * p.n + row;
  LISSOM_UNROLL for (int i = 0; i < Count; ++i) piece[i] = dev::from_float<Out>(v[i]);
  if (w.wide_y && valid >= Count) {
    dev::store(reinterpret_cast<Piece*>(y), piece);
  } else {
    LISSOM_UNROLL for (int i = 0; i < Count; ++i) if (i < valid) dev::store(y + i, piece[i]);
  }
}

}  // namespace lissom::sparse24
