// SPDX-License-Identifier: Apache-2.0
// The torch side of sparse24 on CUDA: checks, allocation, choice of kernel, the current stream. No CUDA header, so that it is
// built against any torch; kept thin, because no test without a GPU can call it.
//
// What would need to wait for the device is asked only where a weight is made (compress, decompress, pack); products never read
// metadata or headers back. Their checks go by the length of the packed vector, and corrupt metadata that nobody checked gives
// NaN (pack.cuh, mask_mm.cuh).
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/zeros.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/library.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <string>
#include <tuple>

#include "core/cuda/device.h"
#include "sparse24/cuda/launch.h"
#include "sparse24/cuda/plan.h"
#include "sparse24/host_checks.h"

namespace lissom::sparse24 {
namespace {

using at::Tensor;

const lissom::cuda::Device& facts(c10::Device device) {
  static std::mutex one;
  static std::map<int, lissom::cuda::Device> known;
  const std::lock_guard<std::mutex> lock(one);
  const auto found = known.find(device.index());
  if (found != known.end()) return found->second;
  lissom::cuda::Device asked{};
  const int error = lissom::cuda::device_facts(device.index(), &asked);
  TORCH_CHECK(error == 0, "lissom: CUDA tells nothing of device ", device, ": ",
              lissom::cuda::error_text(error));
  return known[device.index()] = asked;
}

struct Named {
  const char* name;
  const Tensor& tensor;
};
// The dispatcher sends a call here when one of its tensors is on CUDA: the others' addresses could be of another memory.
void require_one_device(const char* op, std::initializer_list<Named> all) {
  std::string where;
  bool same = true;
  for (const Named& one : all) {
    if (!one.tensor.defined()) continue;
    where += (where.empty() ? "" : ", ") + std::string(one.name) + " on " + one.tensor.device().str();
    same &= one.tensor.device() == all.begin()->tensor.device();
  }
  TORCH_CHECK(same, "lissom::", op, ": all tensors must be on one device; got ", where);
}
Tensor or_undefined(const c10::optional<Tensor>& t) { return t ? *t : Tensor(); }

// While it lives, the device of `t` is the current one.
class OnDeviceOf {
 public:
  OnDeviceOf(const char* op, const Tensor& t) : op_(op), guard_(t.device()), device_(t.device()) {
    const int capability = facts(device_).capability;
    TORCH_CHECK(capability >= 80, "lissom::", op_, ": needs a device of compute capability 8.0 or newer; ",
                device_, " has ", capability / 10, ".", capability % 10, "; move the tensors to the CPU");
  }
  void* stream() const {
    return c10::impl::VirtualGuardImpl(device_.type()).getStream(device_).native_handle();
  }
  void require(int error) const {
    TORCH_CHECK(error == 0, "lissom::", op_, ": CUDA could not start the kernel on ", device_, ": ",
                lissom::cuda::error_text(error), " (error ", error, ")");
  }
  const lissom::cuda::Device& device() const { return facts(device_); }

 private:
  const char* op_;
  c10::DeviceGuard guard_;
  c10::Device device_;
};

bool on_16(const Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Contiguous, on 16 bytes: as it is where it is so, else one copy.
Tensor whole(const Tensor& t) {
  const Tensor c = t.contiguous();
  return on_16(c) ? c : c.clone();
}

// [rows, columns] whose rows lie on 16 bytes: as it is where it is so, else one copy.
Tensor aligned_rows(const Tensor& flat) {
  const int64_t per_line = 16 / static_cast<int64_t>(flat.element_size());
  if (on_16(flat) && (flat.numel() == 0 || flat.size(0) == 1 || flat.stride(0) % per_line == 0)) return flat;
  const int64_t columns = flat.size(1), padded = (columns + per_line - 1) / per_line * per_line;
  Tensor copy = at::empty({flat.size(0), padded}, flat.options()).narrow(1, 0, columns);
  copy.copy_(flat);
  return copy;
}
// Of a single row, or of empty ones, the distance to the next means nothing.
int64_t row_stride_of(const Tensor& rows) {
  return rows.size(0) <= 1 || rows.size(1) == 0 ? 0 : rows.stride(0);
}

const uint8_t* bytes_of(const Tensor& t) { return static_cast<const uint8_t*>(t.const_data_ptr()); }
uint8_t* bytes_of_mutable(const Tensor& t) { return static_cast<uint8_t*>(t.mutable_data_ptr()); }

// --- format ---

// int64 [4] on the device; launch(scratch, verdict).
template <class Launch>
Tensor verdict_by(const OnDeviceOf& on, const Tensor& like, int64_t rows, const Launch& launch) {
  const auto words = like.options().dtype(at::kLong).requires_grad(false);
  const Tensor scratch = at::empty({rows}, words), verdict = at::empty({4}, words);
  on.require(launch(scratch.mutable_data_ptr(), static_cast<int64_t*>(verdict.mutable_data_ptr())));
  return verdict;
}
Tensor verdict_of_dense(const OnDeviceOf& on, const Tensor& w) {
  return verdict_by(on, w, w.size(0), [&](void* scratch, int64_t* verdict) {
    return lissom_sparse24_check(w.const_data_ptr(), w.size(0), w.size(1), static_cast<int>(w.element_size()),
                                 scratch, verdict, on.stream());
  });
}
Tensor verdict_of_meta(const OnDeviceOf& on, const Tensor& meta, int64_t k) {
  return verdict_by(on, meta, meta.size(0), [&](void* scratch, int64_t* verdict) {
    return lissom_sparse24_check_meta(bytes_of(meta), meta.size(0), k, scratch, verdict, on.stream());
  });
}
// Waits for the device.
BadQuad read(const Tensor& verdict) {
  const Tensor here = verdict.cpu();
  const auto* v = static_cast<const int64_t*>(here.const_data_ptr());
  return {v[1], v[2], static_cast<int>(v[3])};
}

Tensor check(const Tensor& w_in) {
  check_dense("sparse24_check", w_in);
  const OnDeviceOf on("sparse24_check", w_in);
  return verdict_of_dense(on, whole(w_in)).narrow(0, 0, 3);
}

Tensor check_meta(const Tensor& meta, int64_t k) {
  check_meta_shape(meta, k);
  const OnDeviceOf on("sparse24_check_meta", meta);
  return verdict_of_meta(on, meta.contiguous(), k).narrow(0, 0, 3);
}

std::tuple<Tensor, Tensor> compress(const Tensor& w_in, c10::string_view pattern) {
  check_dense("sparse24_compress", w_in);
  const bool keep_largest = keeps_largest(pattern);
  const OnDeviceOf on("sparse24_compress", w_in);
  const Tensor w = whole(w_in);
  if (!keep_largest) require_24(read(verdict_of_dense(on, w)));
  const int64_t n = w.size(0), k = w.size(1);
  Tensor values = at::empty({n, k / 2}, w.options());
  Tensor meta = at::empty({n, meta_columns(k)}, w.options().dtype(at::kByte));
  on.require(lissom_sparse24_compress(w.const_data_ptr(), values.mutable_data_ptr(), bytes_of_mutable(meta),
                                      n, k, static_cast<int>(w.element_size()), keep_largest, on.stream()));
  return {values, meta};
}

Tensor expand(const OnDeviceOf& on, const Tensor& values, const Tensor& meta, int64_t k) {
  Tensor w = at::empty({values.size(0), k}, values.options().requires_grad(false));
  on.require(lissom_sparse24_decompress(values.const_data_ptr(), bytes_of(meta), w.mutable_data_ptr(),
                                        values.size(0), k, static_cast<int>(values.element_size()),
                                        on.stream()));
  return w;
}

Tensor decompress(const Tensor& values_in, const Tensor& meta_in, int64_t k) {
  check_canonical("sparse24_decompress", values_in, meta_in, k);
  require_one_device("sparse24_decompress", {{"values", values_in}, {"meta", meta_in}});
  const OnDeviceOf on("sparse24_decompress", values_in);
  const Tensor meta = meta_in.contiguous();
  require_legal("sparse24_decompress", read(verdict_of_meta(on, meta, k)));
  return expand(on, whole(values_in), meta, k);
}

// --- packed ---

void require_own_target(const char* op, c10::optional<c10::string_view> target) {
  TORCH_CHECK_VALUE(
      target_of(op, target, Target::sm80_v1) == Target::sm80_v1, "lissom::", op,
      ": target \"cpu-v1\" is the layout of the CPU; on CUDA leave target out or pass \"sm80-v1\"");
}

Tensor pack_unchecked(const char* op, const OnDeviceOf& on, const Tensor& values_in, const Tensor& meta) {
  const auto t = static_cast<int32_t>(sm80_type(op, values_in));
  const Tensor values = whole(values_in);
  const int64_t n = values.size(0), k = values.size(1) * 2;
  Tensor packed =
      at::empty({sm80::buffer_bytes(n, k, t)}, values.options().dtype(at::kByte).requires_grad(false));
  on.require(lissom_sparse24_pack(values.const_data_ptr(), bytes_of(meta), packed.mutable_data_ptr(), n, k, t,
                                  on.stream()));
  return packed;
}

Tensor pack(const Tensor& values, const Tensor& meta_in, c10::optional<c10::string_view> target) {
  require_own_target("sparse24_pack", target);
  const int64_t k = check_canonical("sparse24_pack", values, meta_in);
  require_int8_columns("sparse24_pack", sm80_type("sparse24_pack", values), k);
  require_one_device("sparse24_pack", {{"values", values}, {"meta", meta_in}});
  const OnDeviceOf on("sparse24_pack", values);
  const Tensor meta = meta_in.contiguous();
  require_legal("sparse24_pack", read(verdict_of_meta(on, meta, k)));
  return pack_unchecked("sparse24_pack", on, values, meta);
}

// The type that the length tells.
DType check_packed(const char* op, const Tensor& packed, int64_t n, int64_t k) {
  TORCH_CHECK(
      packed.scalar_type() == at::kByte && packed.dim() == 1 && packed.is_contiguous() && on_16(packed),
      "lissom::", op, ": packed must be the contiguous uint8 vector that sparse24_pack returned; got ",
      packed.scalar_type(), " ", shape_of(packed));
  TORCH_CHECK(n >= 0 && k >= 0 && k % 4 == 0 && n <= kMostSize && k <= kMostSize, "lissom::", op,
              ": no packed weight has N=", n, ", K=", k);
  for (const DType t : {DType::bf16, DType::f16, DType::i8})
    if (packed.numel() == sm80::buffer_bytes(n, k, static_cast<int32_t>(t)) &&
        (t != DType::i8 || k <= kMostInt8Columns))
      return t;
  TORCH_CHECK(false, "lissom::", op, ": packed must be the sm80-v1 form of N=", n, ", K=", k, " (",
              sm80::buffer_bytes(n, k, 1), " bytes of bfloat16, ", sm80::buffer_bytes(n, k, 2),
              " of float16, ", sm80::buffer_bytes(n, k, 3), " of int8); got ", packed.numel(),
              " bytes; a weight that was packed on the CPU must be packed again on the device, as "
              "Sparse24Linear does in .to()");
}

std::tuple<Tensor, Tensor> unpack(const Tensor& packed, int64_t n, int64_t k,
                                  c10::optional<c10::string_view> target,
                                  c10::optional<at::ScalarType> dtype) {
  require_own_target("sparse24_unpack", target);
  const DType t = check_packed("sparse24_unpack", packed, n, k);
  LISSOM_CHECK_TYPE("sparse24_unpack", !dtype || *dtype == scalar_type(t), "packed holds ", scalar_type(t),
                    "; got dtype=", *dtype);
  const OnDeviceOf on("sparse24_unpack", packed);
  Tensor values = at::empty({n, k / 2}, packed.options().dtype(scalar_type(t)));
  Tensor meta = at::empty({n, meta_columns(k)}, packed.options());
  on.require(lissom_sparse24_unpack(packed.const_data_ptr(), values.mutable_data_ptr(),
                                    bytes_of_mutable(meta), n, k, static_cast<int>(t), on.stream()));
  return {values, meta};
}

// --- linear ---

// On the device, contiguous; of a product in int8.
struct RowScales {
  Tensor w, x;
};

// Everything checked: y, on its way.
Tensor product(const char* op, const Tensor& x, const Tensor& packed, int64_t n, int64_t k,
               const Terms& terms, Act act, DType t, at::ScalarType out, const RowScales& scales) {
  const OnDeviceOf on(op, x);
  Tensor y = at::empty(with_last(x, n), x.options().dtype(out));
  const int64_t m = leading(x);
  if (m == 0 || n == 0) return y;
  const Tensor rows = aligned_rows(rows_of(x, m, k));
  Tensor own_bias, own_residual;
  if (terms.bias && terms.bias->defined()) own_bias = terms.bias->contiguous();
  if (terms.residual && terms.residual->defined()) own_residual = rows_of(*terms.residual, m, n);
  LissomLinear p{};
  p.m = m, p.n = n, p.k = k;
  p.dtype = static_cast<int32_t>(t);
  p.out = static_cast<int32_t>(element_type(op, y, "y"));
  p.act = static_cast<int32_t>(act);
  p.x = rows.const_data_ptr(), p.x_stride = row_stride_of(rows);
  p.records = bytes_of(packed) + sm80::kHeaderBytes;
  p.y = y.mutable_data_ptr();
  if (own_bias.defined()) {
    p.bias = own_bias.const_data_ptr();
    p.bias_dtype = static_cast<int32_t>(element_type(op, own_bias, "bias"));
  }
  if (own_residual.defined()) {
    p.residual = own_residual.const_data_ptr();
    p.residual_stride = row_stride_of(own_residual);
  }
  if (t == DType::i8) {
    p.scale_w = static_cast<const float*>(scales.w.const_data_ptr());
    p.scale_x = static_cast<const float*>(scales.x.const_data_ptr());
  }
  const lissom::cuda::Device& device = on.device();
  const Plan plan =
      choose_plan({m, n, std::max<int64_t>(k, 4), static_cast<int>(x.element_size())},
                  gpu_of(device.capability, device.sms, device.shared_per_block, device.shared_per_sm));
  if (plan.tile < 0) {
    on.require(lissom_sparse24_gemv(&p, on.stream()));
    return y;
  }
  const int64_t bytes = lissom_sparse24_gemm_workspace(m, n, plan.splits);
  const Tensor workspace = at::empty({bytes}, x.options().dtype(at::kByte).requires_grad(false));
  on.require(
      lissom_sparse24_gemm(&p, plan.tile, plan.splits, workspace.mutable_data_ptr(), bytes, on.stream()));
  return y;
}

Tensor linear(const Tensor& x, const Tensor& packed, int64_t n, int64_t k, const c10::optional<Tensor>& bias,
              c10::string_view act, const c10::optional<Tensor>& residual,
              c10::optional<at::ScalarType> out_dtype) {
  require_one_device(
      "sparse24_linear",
      {{"x", x}, {"packed", packed}, {"bias", or_undefined(bias)}, {"residual", or_undefined(residual)}});
  const DType t = check_packed("sparse24_linear", packed, n, k);
  const Terms terms = {bias, residual};
  const at::ScalarType out = check_linear(x, t, n, k, terms, out_dtype);
  const Act chosen = activation("sparse24_linear", act);
  return product("sparse24_linear", x, packed, n, k, terms, chosen, t, out, {});
}

Tensor linear_int8(const Tensor& x, const Tensor& scale_x, const Tensor& packed, const Tensor& scale_w,
                   int64_t n, int64_t k, const c10::optional<Tensor>& bias, c10::string_view act,
                   const c10::optional<Tensor>& residual, c10::optional<at::ScalarType> out_dtype) {
  constexpr const char* kOp = "sparse24_linear_int8";
  require_one_device(kOp, {{"x", x},
                           {"scale_x", scale_x},
                           {"packed", packed},
                           {"scale_w", scale_w},
                           {"bias", or_undefined(bias)},
                           {"residual", or_undefined(residual)}});
  const DType t = check_packed(kOp, packed, n, k);
  const Terms terms = {bias, residual};
  const at::ScalarType out = check_linear_int8(x, {scale_x, scale_w}, t, n, k, terms, out_dtype);
  const RowScales scales = {scale_w.contiguous(), scale_x.contiguous()};
  return product(kOp, x, packed, n, k, terms, activation(kOp, act), t, out, scales);
}

Tensor linear_values(const Tensor& x, const Tensor& values, const Tensor& meta_in,
                     const c10::optional<Tensor>& bias) {
  const int64_t k = check_canonical("sparse24_linear_values", values, meta_in), n = values.size(0);
  element_type("sparse24_linear_values", values, "values");
  require_one_device("sparse24_linear_values",
                     {{"x", x}, {"values", values}, {"meta", meta_in}, {"bias", or_undefined(bias)}});
  const OnDeviceOf on("sparse24_linear_values", values);
  const Tensor meta = meta_in.contiguous();
  if (values.scalar_type() != at::kFloat)
    return linear(x, pack_unchecked("sparse24_linear_values", on, values, meta), n, k, bias, "none",
                  c10::nullopt, c10::nullopt);
  check_linear(x, DType::f32, n, k, {bias, c10::nullopt}, c10::nullopt);
  TORCH_WARN_ONCE(
      "lissom: there are no tensor cores for 2:4 in float32: on CUDA the weight is expanded at every call, "
      "at dense speed "
      "and no gain; cast the model to bfloat16 or float16");
  return at::linear(x, expand(on, whole(values), meta, k), bias);
}

// --- gradients ---

// Rows of dx that a block makes: the larger tile reads W half as often, the smaller one makes twice the blocks.
int grad_tile_rows(int64_t m, int64_t k, int sms) {
  const int64_t blocks = (m + 127) / 128 * ((k + 127) / 128);
  return m > 64 && blocks >= sms ? 128 : 64;
}

Tensor grad_input(const Tensor& dy, const Tensor& packed, int64_t n, int64_t k) {
  require_one_device("sparse24_grad_input", {{"dy", dy}, {"packed", packed}});
  const DType t = check_packed("sparse24_grad_input", packed, n, k);
  check_grad_input(dy, t, n);
  const OnDeviceOf on("sparse24_grad_input", dy);
  Tensor dx = at::empty(with_last(dy, k), dy.options());
  const int64_t m = leading(dy);
  if (m == 0 || k == 0) return dx;
  const Tensor rows = aligned_rows(rows_of(dy, m, n));
  on.require(lissom_sparse24_grad_input(t, grad_tile_rows(m, k, on.device().sms), rows.const_data_ptr(),
                                        row_stride_of(rows), bytes_of(packed) + sm80::kHeaderBytes,
                                        dx.mutable_data_ptr(), m, n, k, on.stream()));
  return dx;
}

Tensor mask_mm(const Tensor& dy, const Tensor& x, const Tensor& meta_in) {
  check_mask_mm(dy, x, meta_in);
  require_one_device("sparse24_mask_mm", {{"dy", dy}, {"x", x}, {"meta", meta_in}});
  const OnDeviceOf on("sparse24_mask_mm", x);
  const int64_t m = leading(x), n = dy.size(-1), k = x.size(-1);
  const Tensor meta = meta_in.contiguous();
  if (m == 0) return at::zeros({n, k / 2}, x.options());
  Tensor values = at::empty({n, k / 2}, x.options());
  const Tensor dy_flat = rows_of(dy, m, n), x_flat = rows_of(x, m, k);
  if (x.scalar_type() == at::kFloat) {
    const Tensor dense = whole(at::mm(dy_flat.t(), x_flat));
    on.require(lissom_sparse24_gather(dense.const_data_ptr(), bytes_of(meta), values.mutable_data_ptr(), n, k,
                                      4, on.stream()));
    return values;
  }
  const Tensor dy_rows = aligned_rows(dy_flat), x_rows = aligned_rows(x_flat);
  on.require(lissom_sparse24_mask_mm(element_type("sparse24_mask_mm", x, "x"), dy_rows.const_data_ptr(),
                                     row_stride_of(dy_rows), x_rows.const_data_ptr(), row_stride_of(x_rows),
                                     bytes_of(meta), values.mutable_data_ptr(), m, n, k, on.stream()));
  return values;
}

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CUDA, m) {
  m.impl("sparse24_compress", compress);
  m.impl("sparse24_decompress", decompress);
  m.impl("sparse24_check", check);
  m.impl("sparse24_check_meta", check_meta);
  m.impl("sparse24_pack", pack);
  m.impl("sparse24_unpack", unpack);
  m.impl("sparse24_linear", linear);
  m.impl("sparse24_linear_int8", linear_int8);
  m.impl("sparse24_linear_values", linear_values);
  m.impl("sparse24_grad_input", grad_input);
  m.impl("sparse24_mask_mm", mask_mm);
}

}  // namespace lissom::sparse24
