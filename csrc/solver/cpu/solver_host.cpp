// SPDX-License-Identifier: Apache-2.0
// The torch side of solver on the CPU: checks, allocation, threads. Compiled without ISA flags.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <atomic>

#include "core/check.h"
#include "core/parallel.h"
#include "solver/solver.h"

namespace lissom::solver {

namespace portable {
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
}  // namespace avx2
namespace avx512 {
extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
}  // namespace avx512
#endif

template <>
const Kernels<float>& kernels<float>(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::avx512) return avx512::kFloat;
  if (isa == CpuIsa::avx2) return avx2::kFloat;
#endif
  (void)isa;
  return portable::kFloat;
}

template <>
const Kernels<double>& kernels<double>(CpuIsa isa) {
#if defined(__x86_64__)
  if (isa >= CpuIsa::avx512) return avx512::kDouble;
  if (isa == CpuIsa::avx2) return avx2::kDouble;
#endif
  (void)isa;
  return portable::kDouble;
}

namespace {

using at::Tensor;
using MaybeTensor = c10::optional<Tensor>;

constexpr int64_t kMostLanes = 16;
constexpr int64_t kUnit = 4096;           // entries of a group pattern that make one unit of work
constexpr int64_t kThreadWork = 1 << 15;  // entries that are worth a thread

template <class T>
const T* data(const Tensor& t) {
  return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
T* mutable_data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}
const uint8_t* mask_data(const MaybeTensor& t) {
  return t ? static_cast<const uint8_t*>(t->const_data_ptr()) : nullptr;
}

// `t` must look like `like`, in which the caller names the shape; masks are bool.
void check_like(const char* op, const char* name, const Tensor& t, const Tensor& like, at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "lissom::", op, ": ", name, " must be ", dtype, "; got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == like.sizes() && t.is_contiguous(), "lissom::", op, ": ", name,
                    " must be contiguous ", shape_of(like), "; got ", shape_of(t), " with strides ",
                    t.strides());
}

void check_float(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "lissom::", op, ": ",
                   name, " must be float32 or float64; got ", t.scalar_type());
}

// Runs body<T>() for the float type of a tensor.
template <class Body>
void with_type(const Tensor& t, const Body& body) {
  if (t.scalar_type() == at::kFloat)
    body(float{});
  else
    body(double{});
}

Tensor admm_step(const Tensor& x, const Tensor& u, const MaybeTensor& b, const Tensor& rhs, double rho,
                 double rho_next, int64_t kept, int64_t group, const MaybeTensor& forced) {
  constexpr const char* op = "solver_admm_step_";
  check_float(op, "x", x);
  TORCH_CHECK_VALUE(x.dim() >= 1 && x.is_contiguous(), "lissom::", op,
                    ": x must be contiguous [..., C]; got ", shape_of(x), " with strides ", x.strides());
  check_like(op, "u", u, x, x.scalar_type());
  if (b) check_like(op, "b", *b, x, x.scalar_type());
  check_like(op, "rhs", rhs, x, x.scalar_type());
  if (forced) check_like(op, "forced", *forced, x, at::kBool);
  TORCH_CHECK_VALUE(rho > 0 && rho_next > 0, "lissom::", op, ": rho and rho_next must be positive; got ", rho,
                    " and ", rho_next);
  TORCH_CHECK_VALUE(
      group >= 1 && kept >= 0 && kept <= group && x.size(-1) % group == 0, "lissom::", op,
      ": kept of group entries must fit with 0 <= kept <= group and C a multiple of group; got kept=", kept,
      ", group=", group, " and C=", x.size(-1));
  const int64_t count = x.numel();
  std::atomic<int64_t> changed{0};
  // Units end where groups and vectors end, so that no result depends on how units are dealt to threads.
  const int64_t step = group * kMostLanes;
  const int64_t unit = group > kRankedGroup ? group : step * std::max<int64_t>(1, kUnit / step);
  const int64_t scratch_entries = group > kRankedGroup ? 2 * group : 0;
  const Tensor scratch = at::empty({scratch_entries * at::get_num_threads()}, x.options());
  with_type(x, [&](auto zero) {
    using T = decltype(zero);
    const Admm<T> step_of = {count,
                             group,
                             group - kept,
                             data<T>(x),
                             mutable_data<T>(u),
                             b ? data<T>(*b) : nullptr,
                             mutable_data<T>(rhs),
                             mask_data(forced),
                             static_cast<T>(rho),
                             static_cast<T>(rho_next)};
    const auto run = kernels<T>(cpu_isa()).admm_step;
    T* const room = mutable_data<T>(scratch);
    parallel((count + unit - 1) / unit, kThreadWork / unit, [&](int64_t begin, int64_t end) {
      T* const own = room + scratch_entries * at::get_thread_num();
      changed += run(step_of, begin * unit, std::min(end * unit, count), own);
    });
  });
  return at::scalar_tensor(changed.load(), x.options().dtype(at::kLong));
}

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CPU, m) { m.impl("solver_admm_step_", admm_step); }

}  // namespace lissom::solver
