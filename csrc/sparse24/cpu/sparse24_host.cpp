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

#include "core/huge_pages.h"
#include "core/parallel.h"
#include "sparse24/host_checks.h"

namespace lissom::sparse24 {
namespace {

using at::Tensor;

constexpr int64_t kRowGrain = 64;
constexpr int64_t kPage = 4096;
constexpr int64_t kGuardPages = 4;                // between the scratch of two threads
constexpr int64_t kPackGrain = 2;                 // tiles of x
constexpr int64_t kLeastWork = int64_t{1} << 18;  // multiply-adds that are worth a thread
constexpr int64_t kDenseBlock = 256;              // rows of W that the backward pass holds as dense

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
  require_legal(op, first_bad_meta(meta, k));
}

Tensor verdict(const BadQuad& bad) {
  return at::tensor({static_cast<int64_t>(bad.row < 0), bad.row, bad.quad}, at::kLong);
}

// --- format -------------------------------------------------------------------------------------------------------------

BadQuad first_bad_dense(const Tensor& w) {
  const int64_t k = w.size(1);
  return first_bad(w.size(0), [&](int64_t begin, int64_t end) {
    return check_rows(w.const_data_ptr(), k, static_cast<int64_t>(w.element_size()), begin, end);
  });
}

std::tuple<Tensor, Tensor> compress(const Tensor& w_in, c10::string_view pattern) {
  check_dense("sparse24_compress", w_in);
  const bool keep_largest = keeps_largest(pattern);
  const Tensor w = w_in.contiguous();
  const int64_t n = w.size(0), k = w.size(1);
  if (!keep_largest) require_24(first_bad_dense(w));
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
  check_meta_shape(meta, k);
  return verdict(first_bad_meta(meta.contiguous(), k));
}

// --- packed -------------------------------------------------------------------------------------------------------------

// make(bytes, options): where the packed form goes.
template <class Make>
Tensor pack_for(const char* op, const Tensor& values_in, const Tensor& meta_in, const Make& make) {
  const int64_t k = check_canonical(op, values_in, meta_in), n = values_in.size(0);
  const Tensor values = values_in.contiguous(), meta = meta_in.contiguous();
  require_legal_meta(op, meta, k);
  const DType t = weight_type(op, values, "values");
  require_int8_columns(op, t, k);
  Tensor packed = make(packed_bytes(n, k, t), values.options().dtype(at::kByte));
  uint8_t* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const PackedHeader header = {
      {'L', 'I', 'S', 'S', 'O', 'M', '2', '4'}, kPackedVersion, static_cast<int32_t>(t), n, k, {}};
  memcpy(out, &header, sizeof header);
  const Canonical in = canonical(values, meta);
  parallel(panels(n), 1, [&](int64_t b, int64_t e) { pack_panels(in, t, out + sizeof header, b, e); });
  return packed;
}

// The form of another device, to look at or to save the device the work: on the CPU nothing computes with it.
Tensor pack_for_sm80(const Tensor& values_in, const Tensor& meta_in) {
  const int64_t k = check_canonical("sparse24_pack", values_in, meta_in), n = values_in.size(0);
  const DType type = sm80_type("sparse24_pack", values_in);
  require_int8_columns("sparse24_pack", type, k);
  const auto t = static_cast<int32_t>(type);
  const Tensor values = values_in.contiguous(), meta = meta_in.contiguous();
  require_legal_meta("sparse24_pack", meta, k);
  Tensor packed = at::empty({sm80::buffer_bytes(n, k, t)}, values.options().dtype(at::kByte));
  uint8_t* out = static_cast<uint8_t*>(packed.mutable_data_ptr());
  const PackedHeader header = sm80::header(n, k, t);
  const int64_t end = sm80::packed_bytes(n, k, values.element_size());
  memset(out, 0, sm80::kHeaderBytes);
  memcpy(out, &header, sizeof header);
  memset(out + end, 0, static_cast<size_t>(packed.numel() - end));
  const Canonical in = canonical(values, meta);
  parallel(sm80::panels(n), 1, [&](int64_t b, int64_t e) { pack_sm80(in, out, b, e); });
  return packed;
}

Tensor pack(const Tensor& values, const Tensor& meta, c10::optional<c10::string_view> target) {
  if (target_of("sparse24_pack", target, Target::cpu_v1) == Target::sm80_v1)
    return pack_for_sm80(values, meta);
  return pack_for("sparse24_pack", values, meta, empty_streamed);
}

PackedHeader header_of(const char* op, const Tensor& packed) {
  TORCH_CHECK(packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous() &&
                  packed.numel() >= static_cast<int64_t>(sizeof(PackedHeader)),
              "lissom::", op,
              ": packed must be the contiguous uint8 vector that sparse24_pack returned; got ",
              packed.scalar_type(), " ", shape_of(packed));
  PackedHeader h;
  memcpy(&h, packed.const_data_ptr(), sizeof h);
  return h;
}

// What both forms' headers must say; `bytes`: length of the whole vector, asked once the sizes are plausible.
template <class Bytes>
void check_header(const char* op, const PackedHeader& h, const Tensor& packed, int64_t n, int64_t k,
                  const Bytes& bytes) {
  TORCH_CHECK(h.n == n && h.k == k, "lissom::", op, ": packed holds a weight of N=", h.n, ", K=", h.k,
              "; got N=", n, ", K=", k);
  const int64_t most = h.dtype == static_cast<int32_t>(DType::i8) ? kMostInt8Columns : kMostSize;
  TORCH_CHECK(n >= 0 && k >= 0 && k % 4 == 0 && n <= kMostSize && k <= most, "lissom::", op,
              ": packed is damaged: its header says N=", n, ", K=", k);
  TORCH_CHECK(packed.numel() == bytes(), "lissom::", op, ": packed is damaged: N=", n, ", K=", k, " need ",
              bytes(), " bytes; got ", packed.numel());
}

DType check_packed(const char* op, const Tensor& packed, int64_t n, int64_t k) {
  const PackedHeader h = header_of(op, packed);
  TORCH_CHECK(memcmp(h.magic, sm80::kMagic, 8) != 0, "lissom::", op,
              ": packed is of target sm80-v1, for CUDA; on the CPU pack the weight for cpu-v1");
  TORCH_CHECK(
      !memcmp(h.magic, "LISSOM24", 8) && h.version == kPackedVersion && h.dtype >= 0 && h.dtype < kTypeCount,
      "lissom::", op, ": packed has no cpu-v1 header of version ", kPackedVersion,
      "; pack the weight again with sparse24_pack");
  const DType t = static_cast<DType>(h.dtype);
  check_header(op, h, packed, n, k, [&] { return packed_bytes(n, k, t); });
  return t;
}

DType check_packed_sm80(const char* op, const Tensor& packed, int64_t n, int64_t k) {
  const PackedHeader h = header_of(op, packed);
  TORCH_CHECK(
      !memcmp(h.magic, sm80::kMagic, 8) && h.version == sm80::kVersion && sm80::element_bytes(h.dtype) > 0,
      "lissom::", op, ": packed has no sm80-v1 header of version ", sm80::kVersion,
      "; pack the weight with target=\"sm80-v1\"");
  check_header(op, h, packed, n, k, [&] { return sm80::buffer_bytes(n, k, h.dtype); });
  return static_cast<DType>(h.dtype);
}

const uint8_t* records_of(const Tensor& packed) {
  return static_cast<const uint8_t*>(packed.const_data_ptr()) + sizeof(PackedHeader);
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t n, int64_t k,
                                  c10::optional<c10::string_view> target,
                                  c10::optional<at::ScalarType> dtype) {
  const bool sm80_v1 = target_of("sparse24_unpack", target, Target::cpu_v1) == Target::sm80_v1;
  const DType t = sm80_v1 ? check_packed_sm80("sparse24_unpack", packed, n, k)
                          : check_packed("sparse24_unpack", packed, n, k);
  LISSOM_CHECK_TYPE("sparse24_unpack", !dtype || *dtype == scalar_type(t), "packed holds ", scalar_type(t),
                    "; got dtype=", *dtype);
  Tensor values = at::empty({n, k / 2}, packed.options().dtype(scalar_type(t)));
  Tensor meta = at::empty({n, meta_columns(k)}, packed.options());
  const Canonical out = canonical(values, meta);
  if (sm80_v1) {
    const uint8_t* in = static_cast<const uint8_t*>(packed.const_data_ptr());
    parallel(sm80::panels(n), 4, [&](int64_t b, int64_t e) { unpack_sm80(in, out, b, e); });
  } else {
    parallel(panels(n), 4, [&](int64_t b, int64_t e) { unpack_panels(records_of(packed), t, out, b, e); });
  }
  return {values, meta};
}

// --- linear -------------------------------------------------------------------------------------------------------------

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

// [n] in float, padded with zeros to whole panels: kernels read 16 at a time.
Tensor padded(const Tensor& row, int64_t n) {
  Tensor whole = at::zeros({panels(n) * kPanelRows}, row.options().dtype(at::kFloat).requires_grad(false));
  whole.narrow(0, 0, n).copy_(row);
  return whole;
}
const float* floats(const Tensor& t) {
  return t.defined() ? static_cast<const float*>(t.const_data_ptr()) : nullptr;
}

// What int8 has beside a Linear of other types.
struct RowScales {
  Tensor w, x;
};

// Everything checked: y, computed.
Tensor product(const Tensor& x, const Tensor& packed, int64_t n, int64_t k, const Terms& terms, Act act,
               DType t, at::ScalarType out, const RowScales& scales) {
  const int64_t m = leading(x);
  Tensor bias, res;
  if (terms.bias && terms.bias->defined()) bias = padded(*terms.bias, n);
  if (terms.residual && terms.residual->defined()) res = rows_of(*terms.residual, m, n);
  Tensor y = at::empty(with_last(x, n), x.options().dtype(out));
  if (m == 0 || n == 0) return y;
  const Tensor flat = rows_of(x, m, k);
  run_linear(
      {m, n, k, flat.const_data_ptr(), flat.stride(0), records_of(packed), floats(bias), floats(scales.w),
       floats(scales.x), res.defined() ? res.const_data_ptr() : nullptr, res.defined() ? res.stride(0) : 0,
       y.mutable_data_ptr(), t, element_type("sparse24_linear", y, "y"), act},
      x);
  return y;
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t n, int64_t k, const c10::optional<Tensor>& bias,
              c10::string_view act, const c10::optional<Tensor>& residual,
              c10::optional<at::ScalarType> out_dtype) {
  const DType t = check_packed("sparse24_linear", packed, n, k);
  const Terms terms = {bias, residual};
  const at::ScalarType out = check_linear(x, t, n, k, terms, out_dtype);
  return product(x, packed, n, k, terms, activation("sparse24_linear", act), t, out, {});
}

Tensor linear_int8(const Tensor& x, const Tensor& scale_x, const Tensor& packed, const Tensor& scale_w,
                   int64_t n, int64_t k, const c10::optional<Tensor>& bias, c10::string_view act,
                   const c10::optional<Tensor>& residual, c10::optional<at::ScalarType> out_dtype) {
  const DType t = check_packed("sparse24_linear_int8", packed, n, k);
  const Terms terms = {bias, residual};
  const at::ScalarType out = check_linear_int8(x, {scale_x, scale_w}, t, n, k, terms, out_dtype);
  const Act chosen = activation("sparse24_linear_int8", act);
  return product(x, packed, n, k, terms, chosen, t, out, {padded(scale_w, n), scale_x.contiguous()});
}

std::tuple<Tensor, Tensor> quantize_rows(const Tensor& x) {
  const DType t = element_type("sparse24_quantize_rows", x, "x");
  LISSOM_CHECK_VALUE("sparse24_quantize_rows", x.dim() >= 1, "x must be [..., K]; got ", shape_of(x));
  const int64_t m = leading(x), k = x.size(-1);
  const Tensor flat = rows_of(x, m, k);
  const auto plain = x.options().requires_grad(false);
  Tensor q = at::empty(x.sizes(), plain.dtype(at::kChar));
  Tensor scale = at::empty(x.sizes().slice(0, x.dim() - 1), plain.dtype(at::kFloat));
  const Rows rows = {m,
                     k,
                     flat.const_data_ptr(),
                     flat.stride(0),
                     t,
                     static_cast<int8_t*>(q.mutable_data_ptr()),
                     static_cast<float*>(scale.mutable_data_ptr())};
  const auto quantize = kernels(cpu_isa()).quantize;
  parallel(m, std::max<int64_t>(1, kLeastWork / std::max<int64_t>(k, 1) / 8),
           [&](int64_t b, int64_t e) { quantize(rows, b, e); });
  return {q, scale};
}

Tensor linear_values(const Tensor& x, const Tensor& values, const Tensor& meta,
                     const c10::optional<Tensor>& bias) {
  element_type("sparse24_linear_values", values, "values");
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
  check_grad_input(dy, t, n);
  const int64_t m = leading(dy);
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
  return sum.to(dy.scalar_type()).reshape(with_last(dy, k));
}

Tensor mask_mm(const Tensor& dy, const Tensor& x, const Tensor& meta_in) {
  check_mask_mm(dy, x, meta_in);
  const int64_t m = leading(x), n = dy.size(-1), k = x.size(-1);
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
  m.impl("sparse24_linear_int8", linear_int8);
  m.impl("sparse24_linear_values", linear_values);
  m.impl("sparse24_quantize_rows", quantize_rows);
  m.impl("sparse24_grad_input", grad_input);
  m.impl("sparse24_mask_mm", mask_mm);
}

}  // namespace lissom::sparse24
