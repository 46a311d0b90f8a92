// SPDX-License-Identifier: Apache-2.0
// What the CPU and the CUDA host ask of their arguments before a kernel sees them, with one wording. No kernel, no device.
#pragma once

#include <ATen/core/Tensor.h>

#include <string>
#include <vector>

#include "core/check.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24 {

constexpr int64_t kMostSize = int64_t{1} << 30;  // of N and K in a header: bytes then stay inside int64

inline DType element_type(const char* op, const at::Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, "lissom::", op, ": ", name, " must be float32, bfloat16 or float16; got ",
                   t.scalar_type());
}

// Of a weight, which may be int8 too.
inline DType weight_type(const char* op, const at::Tensor& t, const char* name) {
  if (t.scalar_type() == at::kChar) return DType::i8;
  const bool real =
      t.scalar_type() == at::kFloat || t.scalar_type() == at::kBFloat16 || t.scalar_type() == at::kHalf;
  TORCH_CHECK_TYPE(real, "lissom::", op, ": ", name, " must be float32, bfloat16, float16 or int8; got ",
                   t.scalar_type());
  return element_type(op, t, name);
}

inline at::ScalarType scalar_type(DType t) {
  constexpr at::ScalarType kTypes[kTypeCount] = {at::kFloat, at::kBFloat16, at::kHalf, at::kChar};
  return kTypes[static_cast<int>(t)];
}

// --- forms ---

inline void check_dense(const char* op, const at::Tensor& w) {
  weight_type(op, w, "w");
  TORCH_CHECK_VALUE(w.dim() == 2, "lissom::", op, ": w must be [N, K]; got ", shape_of(w));
  TORCH_CHECK_VALUE(w.size(1) % 4 == 0, "lissom::", op, ": K must be a multiple of 4; got w ", shape_of(w));
}

inline bool keeps_largest(c10::string_view pattern) {
  LISSOM_CHECK_VALUE("sparse24_compress", pattern == "magnitude" || pattern == "auto",
                     "pattern must be \"auto\" or \"magnitude\"; got \"", pattern, "\"");
  return pattern == "magnitude";
}

inline void require_24(const BadQuad& bad) {
  LISSOM_CHECK_VALUE("sparse24_compress", bad.row < 0, "w is not 2:4 sparse: row ", bad.row, ", quad ",
                     bad.quad, " (columns ", 4 * bad.quad, "..", 4 * bad.quad + 3, ") has ", bad.found,
                     " non-zeros, at most 2 are allowed; prune it first or pass pattern=\"magnitude\"");
}

inline void check_canonical(const char* op, const at::Tensor& values, const at::Tensor& meta, int64_t k) {
  weight_type(op, values, "values");
  TORCH_CHECK_TYPE(meta.scalar_type() == at::kByte, "lissom::", op, ": meta must be uint8; got ",
                   meta.scalar_type());
  TORCH_CHECK_VALUE(values.dim() == 2 && k >= 0 && k % 4 == 0 && values.size(1) * 2 == k, "lissom::", op,
                    ": values must be [N, K/2] with K a multiple of 4; got ", shape_of(values), " and K=", k);
  TORCH_CHECK_VALUE(meta.dim() == 2 && meta.size(0) == values.size(0) && meta.size(1) == meta_columns(k),
                    "lissom::", op, ": meta must be [N=", values.size(0), ", ceil(K/8)=", meta_columns(k),
                    "]; got ", shape_of(meta));
}
// K from the values.
inline int64_t check_canonical(const char* op, const at::Tensor& values, const at::Tensor& meta) {
  TORCH_CHECK_VALUE(values.dim() == 2, "lissom::", op, ": values must be [N, K/2]; got ", shape_of(values));
  check_canonical(op, values, meta, values.size(1) * 2);
  return values.size(1) * 2;
}

inline void check_meta_shape(const at::Tensor& meta, int64_t k) {
  LISSOM_CHECK_TYPE("sparse24_check_meta", meta.scalar_type() == at::kByte, "meta must be uint8; got ",
                    meta.scalar_type());
  LISSOM_CHECK_VALUE(
      "sparse24_check_meta", k >= 0 && k % 4 == 0 && meta.dim() == 2 && meta.size(1) == meta_columns(k),
      "meta must be [N, ceil(K/8)] with K a multiple of 4; got ", shape_of(meta), " and K=", k);
}

inline void require_legal(const char* op, const BadQuad& bad) {
  TORCH_CHECK_VALUE(bad.row < 0, "lissom::", op, ": corrupt metadata: row ", bad.row, ", quad ", bad.quad,
                    " holds nibble 0x", "0123456789ABCDEF"[bad.found & 15],
                    "; wanted one of 0x4 0x8 0x9 0xC 0xD 0xE (and 0x0 behind the last quad)");
}

inline Canonical canonical(const at::Tensor& values, const at::Tensor& meta) {
  return {values.size(0), values.size(1) * 2, values.mutable_data_ptr(),
          static_cast<uint8_t*>(meta.mutable_data_ptr()), static_cast<int64_t>(values.element_size())};
}

// What a packed int8 weight can be.
inline void require_int8_columns(const char* op, DType t, int64_t k) {
  TORCH_CHECK_VALUE(t != DType::i8 || k <= kMostInt8Columns, "lissom::", op,
                    ": an int8 weight may have K=", kMostInt8Columns,
                    " at most, so that sums fit int32; got K=", k);
}

// --- targets ---

enum class Target { cpu_v1, sm80_v1 };
inline Target target_of(const char* op, c10::optional<c10::string_view> name, Target own) {
  if (!name) return own;
  TORCH_CHECK_VALUE(*name == "cpu-v1" || *name == "sm80-v1", "lissom::", op,
                    ": target must be \"cpu-v1\" or \"sm80-v1\"; got \"", *name, "\"");
  return *name == "cpu-v1" ? Target::cpu_v1 : Target::sm80_v1;
}

inline DType sm80_type(const char* op, const at::Tensor& values) {
  const DType t = weight_type(op, values, "values");
  TORCH_CHECK_TYPE(
      t != DType::f32, "lissom::", op,
      ": sm80-v1 holds bfloat16, float16 and int8, for which there are 2:4 tensor cores; got float32; cast "
      "the "
      "weight, or keep it canonical: sparse24_linear_values takes float32 on CUDA, at dense speed");
  return t;
}

// --- products ---

inline Act activation(const char* op, c10::string_view act) {
  constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 5; ++i)
    if (act == kNames[i]) return static_cast<Act>(i);
  TORCH_CHECK_VALUE(false, "lissom::", op, ": act must be one of none, relu, gelu, gelu_tanh, silu; got \"",
                    act, "\"");
}

inline int64_t leading(const at::Tensor& x) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  return m;
}

// x as [M, K] with unit stride in K: a view where the strides allow it, else one copy.
inline at::Tensor rows_of(const at::Tensor& x, int64_t m, int64_t k) {
  at::Tensor flat = x.dim() == 2 ? x : x.reshape({m, k});
  return flat.stride(1) == 1 || k <= 1 ? flat : flat.contiguous();
}

inline std::vector<int64_t> with_last(const at::Tensor& x, int64_t last) {
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = last;
  return shape;
}

// What is added to the product: bias [n] in float32 or `own` (the dtype of x or y, as `whose` says), residual as y.
struct Terms {
  const c10::optional<at::Tensor>& bias;
  const c10::optional<at::Tensor>& residual;
};
inline void check_terms(const char* op, const at::Tensor& x, int64_t n, const Terms& terms, const char* whose,
                        at::ScalarType own, at::ScalarType out) {
  if (const auto& bias = terms.bias; bias && bias->defined()) {
    TORCH_CHECK_VALUE(bias->dim() == 1 && bias->size(0) == n, "lissom::", op, ": bias must be [N=", n,
                      "]; got ", shape_of(*bias));
    TORCH_CHECK_TYPE(bias->scalar_type() == own || bias->scalar_type() == at::kFloat, "lissom::", op,
                     ": bias must be float32 or ", whose, " dtype ", own, "; got ", bias->scalar_type());
    TORCH_CHECK(bias->device() == x.device(), "lissom::", op, ": bias must be on x's device ", x.device(),
                "; got ", bias->device());
  }
  if (const auto& residual = terms.residual; residual && residual->defined()) {
    const std::vector<int64_t> shape = with_last(x, n);
    TORCH_CHECK_VALUE(residual->sizes() == at::IntArrayRef(shape), "lissom::", op,
                      ": residual must have y's shape ", at::IntArrayRef(shape), "; got ",
                      shape_of(*residual));
    TORCH_CHECK_TYPE(residual->scalar_type() == out, "lissom::", op, ": residual must have y's dtype ", out,
                     "; got ", residual->scalar_type());
    TORCH_CHECK(residual->device() == x.device(), "lissom::", op, ": residual must be on x's device ",
                x.device(), "; got ", residual->device());
  }
}

// Shapes, dtypes and devices of a sparse24_linear on W [n, k] of type t; the dtype of y.
inline at::ScalarType check_linear(const at::Tensor& x, DType t, int64_t n, int64_t k, const Terms& terms,
                                   c10::optional<at::ScalarType> out_dtype) {
  LISSOM_CHECK_VALUE("sparse24_linear", x.dim() >= 1 && x.size(-1) == k, "x must be [..., K=", k, "]; got ",
                     shape_of(x));
  LISSOM_CHECK_TYPE("sparse24_linear", t != DType::i8,
                    "packed holds int8, which needs scales: call sparse24_linear_int8");
  LISSOM_CHECK_TYPE("sparse24_linear", x.scalar_type() == scalar_type(t),
                    "x and the packed weight must have one dtype; got ", x.scalar_type(), " and ",
                    scalar_type(t), "; cast x, or pack the weight in x's dtype");
  const at::ScalarType out = out_dtype.value_or(x.scalar_type());
  LISSOM_CHECK_TYPE("sparse24_linear", out == x.scalar_type() || out == at::kFloat,
                    "out_dtype must be float32 or x's dtype ", x.scalar_type(), "; got ", out);
  check_terms("sparse24_linear", x, n, terms, "x's", x.scalar_type(), out);
  return out;
}

struct Scales {
  const at::Tensor& x;  // [...]: one a row of x
  const at::Tensor& w;  // [n]
};

// The same of a sparse24_linear_int8.
inline at::ScalarType check_linear_int8(const at::Tensor& x, const Scales& scales, DType t, int64_t n,
                                        int64_t k, const Terms& terms,
                                        c10::optional<at::ScalarType> out_dtype) {
  constexpr const char* kOp = "sparse24_linear_int8";
  LISSOM_CHECK_TYPE("sparse24_linear_int8", t == DType::i8, "packed must hold an int8 weight; got ",
                    scalar_type(t), ": quantize_rows makes one of it, sparse24_linear takes it as it is");
  LISSOM_CHECK_VALUE("sparse24_linear_int8", x.dim() >= 1 && x.size(-1) == k, "x must be [..., K=", k,
                     "]; got ", shape_of(x));
  LISSOM_CHECK_TYPE("sparse24_linear_int8", x.scalar_type() == at::kChar, "x must be int8; got ",
                    x.scalar_type(), ": quantize_rows makes int8 and scale_x of it");
  LISSOM_CHECK_VALUE("sparse24_linear_int8", scales.x.sizes() == x.sizes().slice(0, x.dim() - 1),
                     "scale_x must have the leading shape of x, ", x.sizes().slice(0, x.dim() - 1), "; got ",
                     shape_of(scales.x));
  LISSOM_CHECK_VALUE("sparse24_linear_int8", scales.w.dim() == 1 && scales.w.size(0) == n,
                     "scale_w must be [N=", n, "]; got ", shape_of(scales.w));
  LISSOM_CHECK_TYPE(
      "sparse24_linear_int8", scales.x.scalar_type() == at::kFloat && scales.w.scalar_type() == at::kFloat,
      "scale_x and scale_w must be float32; got ", scales.x.scalar_type(), " and ", scales.w.scalar_type());
  const at::ScalarType out = out_dtype.value_or(at::kFloat);
  LISSOM_CHECK_TYPE("sparse24_linear_int8", out == at::kFloat || out == at::kBFloat16 || out == at::kHalf,
                    "out_dtype must be float32, bfloat16 or float16; got ", out);
  check_terms(kOp, x, n, terms, "y's", out, out);
  return out;
}

inline void check_grad_input(const at::Tensor& dy, DType t, int64_t n) {
  LISSOM_CHECK_VALUE("sparse24_grad_input", dy.dim() >= 1 && dy.size(-1) == n, "dy must be [..., N=", n,
                     "]; got ", shape_of(dy));
  LISSOM_CHECK_TYPE("sparse24_grad_input", t != DType::i8, "packed holds int8, which has no gradients");
  LISSOM_CHECK_TYPE("sparse24_grad_input", dy.scalar_type() == scalar_type(t),
                    "dy and the packed weight must have one dtype; got ", dy.scalar_type(), " and ",
                    scalar_type(t));
}

inline void check_mask_mm(const at::Tensor& dy, const at::Tensor& x, const at::Tensor& meta) {
  element_type("sparse24_mask_mm", x, "x");
  LISSOM_CHECK_TYPE("sparse24_mask_mm", dy.scalar_type() == x.scalar_type(),
                    "dy and x must have one dtype; got ", dy.scalar_type(), " and ", x.scalar_type());
  LISSOM_CHECK_VALUE("sparse24_mask_mm",
                     x.dim() >= 1 && dy.dim() == x.dim() &&
                         dy.sizes().slice(0, dy.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                     "dy [..., N] and x [..., K] must share their leading dimensions; got ", shape_of(dy),
                     " and ", shape_of(x));
  const int64_t n = dy.size(-1), k = x.size(-1);
  LISSOM_CHECK_VALUE("sparse24_mask_mm", k % 4 == 0, "K must be a multiple of 4; got x ", shape_of(x));
  LISSOM_CHECK_TYPE("sparse24_mask_mm", meta.scalar_type() == at::kByte, "meta must be uint8; got ",
                    meta.scalar_type());
  LISSOM_CHECK_VALUE("sparse24_mask_mm",
                     meta.dim() == 2 && meta.size(0) == n && meta.size(1) == meta_columns(k),
                     "meta must be [N=", n, ", ceil(K/8)=", meta_columns(k), "]; got ", shape_of(meta));
}

}  // namespace lissom::sparse24
