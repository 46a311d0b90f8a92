// SPDX-License-Identifier: Apache-2.0
// The torch side of sparse24 on the CPU: checks, allocation, threads.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/matmul.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/tensor.h>
#include <ATen/ops/zeros.h>
#include <torch/library.h>

#include <atomic>
#include <memory>
#include <tuple>
#include <vector>

#include "core/check.h"
#include "core/huge_pages.h"
#include "core/parallel.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24 {
namespace {

using at::Tensor;

constexpr int64_t kMostSize = int64_t{1} << 30;  // of N and K in a header: bytes then stay inside int64
constexpr int64_t kRowGrain = 64;
constexpr int64_t kPage = 4096;
constexpr int64_t kGuardPages = 4;                // between the scratch of two threads
constexpr int64_t kPackGrain = 2;                 // tiles of x
constexpr int64_t kLeastWork = int64_t{1} << 18;  // multiply-adds that are worth a thread
constexpr int64_t kDenseBlock = 256;              // rows of W that the backward pass holds as dense

DType element_type(const char* op, const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case at::kFloat: return DType::f32;
    case at::kBFloat16: return DType::bf16;
    case at::kHalf: return DType::f16;
    default: break;
  }
  TORCH_CHECK_TYPE(false, "lissom::", op, ": ", name, " must be float32, bfloat16 or float16; got ",
                   t.scalar_type());
}

at::ScalarType scalar_type(DType t) {
  return t == DType::f32 ? at::kFloat : t == DType::bf16 ? at::kBFloat16 : at::kHalf;
}

Canonical canonical(const Tensor& values, const Tensor& meta) {
  return {values.size(0), values.size(1) * 2, values.mutable_data_ptr(),
          static_cast<uint8_t*>(meta.mutable_data_ptr()), static_cast<int64_t>(values.element_size())};
}

void check_canonical(const char* op, const Tensor& values, const Tensor& meta, int64_t k) {
  element_type(op, values, "values");
  TORCH_CHECK_TYPE(meta.scalar_type() == at::kByte, "lissom::", op, ": meta must be uint8; got ",
                   meta.scalar_type());
  TORCH_CHECK_VALUE(values.dim() == 2 && k >= 0 && k % 4 == 0 && values.size(1) * 2 == k, "lissom::", op,
                    ": values must be [N, K/2] with K a multiple of 4; got ", shape_of(values), " and K=", k);
  TORCH_CHECK_VALUE(meta.dim() == 2 && meta.size(0) == values.size(0) && meta.size(1) == meta_columns(k),
                    "lissom::", op, ": meta must be [N=", values.size(0), ", ceil(K/8)=", meta_columns(k),
                    "]; got ", shape_of(meta));
}

// Least bad quad over all rows, by blocks in parallel.
template <class F>
BadQuad first_bad(int64_t rows, const F& find) {
  const int64_t blocks = (rows + kRowGrain - 1) / kRowGrain;
  std::vector<BadQuad> bad(static_cast<size_t>(blocks), BadQuad{-1, -1, 0});
  parallel(blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b)
      bad[static_cast<size_t>(b)] = find(b * kRowGrain, std::min(rows, (b + 1) * kRowGrain));
  });
  for (const BadQuad& b : bad)
    if (b.row >= 0) return b;
  return {-1, -1, 0};
}

BadQuad first_bad_meta(const Tensor& meta, int64_t k) {
  const uint8_t* p = static_cast<const uint8_t*>(meta.const_data_ptr());
  return first_bad(meta.size(0),
                   [&](int64_t begin, int64_t end) { return check_meta_rows(p, k, begin, end); });
}

void require_legal_meta(const char* op, const Tensor& meta, int64_t k) {
  const BadQuad bad = first_bad_meta(meta, k);
  TORCH_CHECK_VALUE(bad.row < 0, "lissom::", op, ": corrupt metadata: row ", bad.row, ", quad ", bad.quad,
                    " holds nibble 0x", "0123456789ABCDEF"[bad.found & 15],
                    "; wanted one of 0x4 0x8 0x9 0xC 0xD 0xE (and 0x0 behind the last quad)");
}

Tensor verdict(const BadQuad& bad) {
  return at::tensor({static_cast<int64_t>(bad.row < 0), bad.row, bad.quad}, at::kLong);
}

// --- format -------------------------------------------------------------------------------------------------------------

void check_dense(const char* op, const Tensor& w) {
  element_type(op, w, "w");
  TORCH_CHECK_VALUE(w.dim() == 2, "lissom::", op, ": w must be [N, K]; got ", shape_of(w));
  TORCH_CHECK_VALUE(w.size(1) % 4 == 0, "lissom::", op, ": K must be a multiple of 4; got w ", shape_of(w));
}

BadQuad first_bad_dense(const Tensor& w) {
  const int64_t k = w.size(1);
  return first_bad(w.size(0), [&](int64_t begin, int64_t end) {
    return check_rows(w.const_data_ptr(), k, static_cast<int64_t>(w.element_size()), begin, end);
  });
}

std::tuple<Tensor, Tensor> compress(const Tensor& w_in, c10::string_view pattern) {
  check_dense("sparse24_compress", w_in);
  const bool keep_largest = pattern == "magnitude";
  LISSOM_CHECK_VALUE("sparse24_compress", keep_largest || pattern == "auto",
                     "pattern must be \"auto\" or \"magnitude\"; got \"", pattern, "\"");
  const Tensor w = w_in.contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  if (!keep_largest) {
    const BadQuad bad = first_bad_dense(w);
    LISSOM_CHECK_VALUE("sparse24_compress", bad.row < 0, "w is not 2:4 sparse: row ", bad.row, ", quad ",
                       bad.quad, " (columns ", 4 * bad.quad, "..", 4 * bad.quad + 3, ") has ", bad.found,
                       " non-zeros, at most 2 are allowed; prune it first or pass pattern=\"magnitude\"");
  }
  Tensor values = at::empty({n, k / 2}, w.options());
  Tensor meta = at::empty({n, meta_columns(k)}, w.options().dtype(at::kByte));
  const Canonical out = canonical(values, meta);
  parallel(n, kRowGrain,
           [&](int64_t b, int64_t e) { compress_rows(w.const_data_ptr(), out, keep_largest, b, e); });
  return {values, meta};
}

Tensor decompress(const Tensor& values_in, const Tensor& meta_in, int64_t k) {
  check_canonical("sparse24_decompress", values_in, meta_in, k);
  const Tensor values = values_in.contiguous(), meta = meta_in.contiguous();
  require_legal_meta("sparse24_decompress", meta, k);
  Tensor w = at::empty({values.size(0), k}, values.options());
  const Canonical in = canonical(values, meta);
  void* out = w.mutable_data_ptr();
  parallel(in.n, kRowGrain, [&](int64_t b, int64_t e) { decompress_rows(in, out, b, e); });
  return w;
}

Tensor check(const Tensor& w) {
  check_dense("sparse24_check", w);
  return verdict(first_bad_dense(w.contiguous()));
}

Tensor check_meta(const Tensor& meta, int64_t k) {
  LISSOM_CHECK_TYPE("sparse24_check_meta", meta.scalar_type() == at::kByte, "meta must be uint8; got ",
                    meta.scalar_type());
  LISSOM_CHECK_VALUE(
      "sparse24_check_meta", k >= 0 && k % 4 == 0 && meta.dim() == 2 && meta.size(1) == meta_columns(k),
      "meta must be [N, ceil(K/8)] with K a multiple of 4; got ", shape_of(meta), " and K=", k);
  return verdict(first_bad_meta(meta.contiguous(), k));
}

// --- packed -------------------------------------------------------------------------------------------------------------

void check_target(const char* op, c10::string_view target) {
  TORCH_CHECK_VALUE(target == "cpu-v1", "lissom::", op,
                    ": target must be \"cpu-v1\" (the only one in this build); got \"", target, "\"");
}

// make(bytes, options): where the packed form goes.
template <class Make>
Tensor pack_for(const char* op, const Tensor& values_in, const Tensor& meta_in, const Make& make) {
  TORCH_CHECK_VALUE(values_in.dim() == 2, "lissom::", op, ": values must be [N, K/2]; got ",
                    shape_of(values_in));
  const int64_t n = values_in.size(0), k = values_in.size(1) * 2;
  check_canonical(op, values_in, meta_in, k);
  const Tensor values = values_in.contiguous(), meta = meta_in.contiguous();
  require_legal_meta(op, meta, k);
  const DType t = element_type(op, values, "values");
  Tensor packed = make(packed_bytes(n, k, t), values.options().dtype(at::kByte));
  uint8_t* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const PackedHeader header = {
      {'L', 'I', 'S', 'S', 'O', 'M', '2', '4'}, kPackedVersion, static_cast<int32_t>(t), n, k, {}};
  memcpy(out, &header, sizeof header);
  const Canonical in = canonical(values, meta);
  parallel(panels(n), 1, [&](int64_t b, int64_t e) { pack_panels(in, t, out + sizeof header, b, e); });
  return packed;
}

Tensor pack(const Tensor& values, const Tensor& meta, c10::string_view target) {
  check_target("sparse24_pack", target);
  return pack_for("sparse24_pack", values, meta, empty_streamed);
}

DType check_packed(const char* op, const Tensor& packed, int64_t n, int64_t k) {
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous() &&
                  packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
              "lissom::", op,
              ": packed must be the contiguous uint8 vector that sparse24_pack returned; got ",
              packed.scalar_type(), " ", shape_of(packed));
  PackedHeader h;
  memcpy(&h, packed.const_data_ptr(), sizeof h);
  TORCH_CHECK(!memcmp(h.magic, "LISSOM24", 8) && h.version == kPackedVersion && h.dtype >= 0 && h.dtype <= 2,
              "lissom::", op, ": packed has no cpu-v1 header of version ", kPackedVersion,
              "; pack the weight again with sparse24_pack");
  TORCH_CHECK(h.n == n && h.k == k, "lissom::", op, ": packed holds a weight of N=", h.n, ", K=", h.k,
              "; got N=", n, ", K=", k);
  const DType t = static_cast<DType>(h.dtype);
  TORCH_CHECK(n >= 0 && k >= 0 && k % 4 == 0 && n <= kMostSize && k <= kMostSize, "lissom::", op,
              ": packed is damaged: its header says N=", n, ", K=", k);
  TORCH_CHECK(packed.numel() == packed_bytes(n, k, t), "lissom::", op, ": packed is damaged: N=", n,
              ", K=", k, " need ", packed_bytes(n, k, t), " bytes; got ", packed.numel());
  return t;
}

const uint8_t* records_of(const Tensor& packed) {
  return static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof(PackedHeader);
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t n, int64_t k, c10::string_view target,
                                  c10::optional<at::ScalarType> dtype) {
  check_target("sparse24_unpack", target);
  const DType t = check_packed("sparse24_unpack", packed, n, k);
  LISSOM_CHECK_TYPE("sparse24_unpack", !dtype || *dtype == scalar_type(t), "packed holds ", scalar_type(t),
                    "; got dtype=", *dtype);
  Tensor values = at::empty({n, k / 2}, packed.options().dtype(scalar_type(t)));
  Tensor meta = at::empty({n, meta_columns(k)}, packed.options());
  const Canonical out = canonical(values, meta);
  parallel(panels(n), 4, [&](int64_t b, int64_t e) { unpack_panels(records_of(packed), t, out, b, e); });
  return {values, meta};
}

// --- linear -------------------------------------------------------------------------------------------------------------

Act activation(c10::string_view act) {
  constexpr const char* kNames[] = {"none", "relu", "gelu", "gelu_tanh", "silu"};
  for (int i = 0; i < 5; ++i)
    if (act == kNames[i]) return static_cast<Act>(i);
  LISSOM_CHECK_VALUE("sparse24_linear", false, "act must be one of none, relu, gelu, gelu_tanh, silu; got \"",
                     act, "\"");
}

// x as [M, K] with unit stride in K: a view where the strides allow it, else one copy.
Tensor rows_of(const Tensor& x, int64_t m, int64_t k) {
  Tensor flat = x.dim() == 2 ? x : x.reshape({m, k});
  return flat.stride(1) == 1 || k <= 1 ? flat : flat.contiguous();
}

int64_t leading(const Tensor& x) {
  int64_t m = 1;
  for (int64_t i = 0; i + 1 < x.dim(); ++i) m *= x.size(i);
  return m;
}

// 64-byte aligned scratch; torch's allocator gives that.
Tensor workspace(const Tensor& like, size_t bytes) {
  return at::empty({static_cast<int64_t>(bytes)}, like.options().dtype(at::kByte).requires_grad(false));
}

// packed x, or an undefined tensor where the path cannot take this x.
Tensor pack_x(const Path& path, const Linear& problem, const Tensor& like) {
  const Tensor packed_x = workspace(like, path.x_bytes(problem));
  void* out = packed_x.mutable_data_ptr();
  std::atomic<bool> fits{true};
  parallel(path.x_tiles(problem), kPackGrain, [&](int64_t b, int64_t e) {
    if (!path.pack_x(problem, b, e, out)) fits.store(false, std::memory_order_relaxed);
  });
  return fits ? packed_x : Tensor();
}

void run_linear(const Linear& problem, const Tensor& like) {
  const CpuIsa isa = cpu_isa();
  const Path* chosen = &choose_path(isa, problem.dtype, problem.m);
  Tensor packed_x = pack_x(*chosen, problem, like);
  if (!packed_x.defined()) {
    chosen = &choose_path(isa, problem.dtype, problem.m, false);
    packed_x = pack_x(*chosen, problem, like);
  }
  const Path& path = *chosen;
  // Pairs of panels are the unit, so that a split between threads does not break a pair.
  const int64_t count = panels(problem.n), pairs = (count + 1) / 2;
  const int64_t work = problem.m * problem.k * 32;  // multiply-adds of a pair
  const int64_t grain = std::max<int64_t>(1, kLeastWork / std::max<int64_t>(work, 1));
  // Whole pages a thread: the hardware prefetchers run to the end of a page, and would pull a neighbour's lines away.
  const int64_t own_pages =
      (static_cast<int64_t>(path.scratch_bytes(problem)) + kPage - 1) / kPage + kGuardPages;
  const Tensor scratch =
      workspace(like, static_cast<size_t>((own_pages * at::get_num_threads() + 1) * kPage));
  const auto base = (reinterpret_cast<uintptr_t>(scratch.mutable_data_ptr()) + kPage - 1) / kPage * kPage;
  const void* x = packed_x.const_data_ptr();
  parallel(pairs, grain, [&](int64_t b, int64_t e) {
    void* own = reinterpret_cast<void*>(base + own_pages * kPage * at::get_thread_num());
    path.run(problem, x, 2 * b, std::min(2 * e, count), own);
  });
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t n, int64_t k, const c10::optional<Tensor>& bias,
              c10::string_view act, const c10::optional<Tensor>& residual,
              c10::optional<at::ScalarType> out_dtype) {
  const DType t = check_packed("sparse24_linear", packed, n, k);
  LISSOM_CHECK_VALUE("sparse24_linear", x.dim() >= 1 && x.size(-1) == k, "x must be [..., K=", k, "]; got ",
                     shape_of(x));
  LISSOM_CHECK_TYPE("sparse24_linear", x.scalar_type() == scalar_type(t),
                    "x and the packed weight must have one dtype; got ", x.scalar_type(), " and ",
                    scalar_type(t), "; cast x, or pack the weight in x's dtype");
  const at::ScalarType out = out_dtype.value_or(x.scalar_type());
  LISSOM_CHECK_TYPE("sparse24_linear", out == x.scalar_type() || out == at::kFloat,
                    "out_dtype must be float32 or x's dtype ", x.scalar_type(), "; got ", out);
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = n;
  const int64_t m = leading(x);

  Tensor padded_bias;
  if (bias && bias->defined()) {
    LISSOM_CHECK_VALUE("sparse24_linear", bias->dim() == 1 && bias->size(0) == n, "bias must be [N=", n,
                       "]; got ", shape_of(*bias));
    LISSOM_CHECK_TYPE("sparse24_linear",
                      bias->scalar_type() == x.scalar_type() || bias->scalar_type() == at::kFloat,
                      "bias must be float32 or x's dtype ", x.scalar_type(), "; got ", bias->scalar_type());
    LISSOM_CHECK("sparse24_linear", bias->device() == x.device(), "bias must be on x's device ", x.device(),
                 "; got ", bias->device());
    padded_bias = at::zeros({panels(n) * kPanelRows}, x.options().dtype(at::kFloat).requires_grad(false));
    padded_bias.narrow(0, 0, n).copy_(*bias);
  }
  Tensor res;
  if (residual && residual->defined()) {
    LISSOM_CHECK_VALUE("sparse24_linear", residual->sizes() == at::IntArrayRef(shape),
                       "residual must have y's shape ", at::IntArrayRef(shape), "; got ",
                       shape_of(*residual));
    LISSOM_CHECK_TYPE("sparse24_linear", residual->scalar_type() == out, "residual must have y's dtype ", out,
                      "; got ", residual->scalar_type());
    LISSOM_CHECK("sparse24_linear", residual->device() == x.device(), "residual must be on x's device ",
                 x.device(), "; got ", residual->device());
    res = rows_of(*residual, m, n);
  }
  const Act chosen = activation(act);
  Tensor y = at::empty(shape, x.options().dtype(out));
  if (m == 0 || n == 0) return y;
  const Tensor flat = rows_of(x, m, k);
  const Linear problem = {
      m,
      n,
      k,
      flat.const_data_ptr(),
      flat.stride(0),
      records_of(packed),
      padded_bias.defined() ? static_cast<const float*>(padded_bias.const_data_ptr()) : nullptr,
      res.defined() ? res.const_data_ptr() : nullptr,
      res.defined() ? res.stride(0) : 0,
      y.mutable_data_ptr(),
      t,
      out == at::kFloat ? DType::f32 : t,
      chosen};
  run_linear(problem, x);
  return y;
}

Tensor linear_values(const Tensor& x, const Tensor& values, const Tensor& meta,
                     const c10::optional<Tensor>& bias) {
  // One call's worth: torch's allocator, which hands out pages that it has already.
  const Tensor packed =
      pack_for("sparse24_linear_values", values, meta,
               [](int64_t bytes, const at::TensorOptions& options) { return at::empty({bytes}, options); });
  return linear(x, packed, values.size(0), values.size(1) * 2, bias, "none", c10::nullopt, c10::nullopt);
}

// --- gradients ----------------------------------------------------------------------------------------------------------

// W is not 2:4 along N, so dx = dy W runs dense, expanding kDenseBlock rows of W at a time.
Tensor grad_input(const Tensor& dy, const Tensor& packed, int64_t n, int64_t k) {
  const DType t = check_packed("sparse24_grad_input", packed, n, k);
  LISSOM_CHECK_VALUE("sparse24_grad_input", dy.dim() >= 1 && dy.size(-1) == n, "dy must be [..., N=", n,
                     "]; got ", shape_of(dy));
  LISSOM_CHECK_TYPE("sparse24_grad_input", dy.scalar_type() == scalar_type(t),
                    "dy and the packed weight must have one dtype; got ", dy.scalar_type(), " and ",
                    scalar_type(t));
  const int64_t m = leading(dy);
  std::vector<int64_t> shape(dy.sizes().begin(), dy.sizes().end());
  shape.back() = k;
  const Tensor rows = rows_of(dy, m, n);
  Tensor sum = at::zeros({m, k}, dy.options().dtype(at::kFloat));
  for (int64_t first = 0; first < n && m > 0; first += kDenseBlock) {
    const int64_t here = std::min(kDenseBlock, n - first);
    Tensor values = at::empty({here, k / 2}, dy.options());
    Tensor meta = at::empty({here, meta_columns(k)}, dy.options().dtype(at::kByte));
    Tensor w = at::empty({here, k}, dy.options());
    const Canonical block = canonical(values, meta);
    const uint8_t* records = records_of(packed) + first / kPanelRows * panel_bytes(k, t);
    parallel(panels(here), 1, [&](int64_t b, int64_t e) {
      unpack_panels(records, t, block, b, e);
      decompress_rows(block, w.mutable_data_ptr(), b * kPanelRows, std::min(e * kPanelRows, here));
    });
    const Tensor part = rows.narrow(1, first, here);
    // A part may leave the range of float16 even if the sum does not.
    sum.add_(t == DType::f16 ? at::mm(part.to(at::kFloat), w.to(at::kFloat)) : at::mm(part, w));
  }
  return sum.to(dy.scalar_type()).reshape(shape);
}

Tensor mask_mm(const Tensor& dy, const Tensor& x, const Tensor& meta_in) {
  element_type("sparse24_mask_mm", x, "x");
  LISSOM_CHECK_TYPE("sparse24_mask_mm", dy.scalar_type() == x.scalar_type(),
                    "dy and x must have one dtype; got ", dy.scalar_type(), " and ", x.scalar_type());
  LISSOM_CHECK_VALUE("sparse24_mask_mm",
                     x.dim() >= 1 && dy.dim() == x.dim() &&
                         dy.sizes().slice(0, dy.dim() - 1) == x.sizes().slice(0, x.dim() - 1),
                     "dy [..., N] and x [..., K] must share their leading dimensions; got ", shape_of(dy),
                     " and ", shape_of(x));
  const int64_t m = leading(x), n = dy.size(-1), k = x.size(-1);
  LISSOM_CHECK_VALUE("sparse24_mask_mm", k % 4 == 0, "K must be a multiple of 4; got x ", shape_of(x));
  LISSOM_CHECK_TYPE("sparse24_mask_mm", meta_in.scalar_type() == at::kByte, "meta must be uint8; got ",
                    meta_in.scalar_type());
  LISSOM_CHECK_VALUE("sparse24_mask_mm",
                     meta_in.dim() == 2 && meta_in.size(0) == n && meta_in.size(1) == meta_columns(k),
                     "meta must be [N=", n, ", ceil(K/8)=", meta_columns(k), "]; got ", shape_of(meta_in));
  const Tensor meta = meta_in.contiguous();
  require_legal_meta("sparse24_mask_mm", meta, k);
  Tensor values = at::zeros({n, k / 2}, x.options());
  if (m == 0) return values;
  const Tensor dy_rows = rows_of(dy, m, n), x_rows = rows_of(x, m, k);
  const Canonical out = canonical(values, meta);
  for (int64_t first = 0; first < n; first += kDenseBlock) {
    const int64_t last = std::min(n, first + kDenseBlock);
    const Tensor dense = at::mm(dy_rows.narrow(1, first, last - first).t(), x_rows).contiguous();
    parallel(last - first, kRowGrain, [&](int64_t b, int64_t e) {
      gather_rows(dense.const_data_ptr(), out, first, first + b, first + e);
    });
  }
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CPU, m) {
  m.impl("sparse24_compress", compress);
  m.impl("sparse24_decompress", decompress);
  m.impl("sparse24_check", check);
  m.impl("sparse24_check_meta", check_meta);
  m.impl("sparse24_pack", pack);
  m.impl("sparse24_unpack", unpack);
  m.impl("sparse24_linear", linear);
  m.impl("sparse24_linear_values", linear_values);
  m.impl("sparse24_grad_input", grad_input);
  m.impl("sparse24_mask_mm", mask_mm);
}

}  // namespace lissom::sparse24
