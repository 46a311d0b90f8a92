// SPDX-License-Identifier: Apache-2.0
// The torch side of solver on the CPU: checks, allocation, threads. Compiled without ISA flags.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/scalar_tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <tuple>
#include <vector>

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
constexpr int64_t kMostColumns = 46340;   // of an H whose entries are numbered by int32
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

void check_like(const char* op, const char* name, const Tensor& t, at::IntArrayRef shape,
                at::ScalarType dtype) {
  TORCH_CHECK_TYPE(t.scalar_type() == dtype, "lissom::", op, ": ", name, " must be ", dtype, "; got ",
                   t.scalar_type());
  TORCH_CHECK_VALUE(t.sizes() == shape && t.is_contiguous(), "lissom::", op, ": ", name,
                    " must be contiguous ", shape, "; got ", shape_of(t), " with strides ", t.strides());
}

void check_float(const char* op, const char* name, const Tensor& t) {
  TORCH_CHECK_TYPE(t.scalar_type() == at::kFloat || t.scalar_type() == at::kDouble, "lissom::", op, ": ",
                   name, " must be float32 or float64; got ", t.scalar_type());
}

void check_group(const char* op, const char* name, int64_t columns, int64_t kept, int64_t group) {
  TORCH_CHECK_VALUE(group >= 1 && kept >= 0 && kept <= group && columns % group == 0, "lissom::", op,
                    ": kept of group entries must fit with 0 <= kept <= group and ", name,
                    " a multiple of group; got kept=", kept, ", group=", group, " and ", name, "=", columns);
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
  check_like(op, "u", u, x.sizes(), x.scalar_type());
  if (b) check_like(op, "b", *b, x.sizes(), x.scalar_type());
  check_like(op, "rhs", rhs, x.sizes(), x.scalar_type());
  if (forced) check_like(op, "forced", *forced, x.sizes(), at::kBool);
  TORCH_CHECK_VALUE(rho > 0 && rho_next > 0, "lissom::", op, ": rho and rho_next must be positive; got ", rho,
                    " and ", rho_next);
  check_group(op, "C", x.size(-1), kept, group);
  const int64_t count = x.numel();
  std::atomic<int64_t> changed{0};
  // Units end where groups and vectors end.
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

Tensor pcg_step(const Tensor& w, const Tensor& r, const Tensor& p, const Tensor& q, const Tensor& energy,
                const Tensor& scale, const Tensor& pruned) {
  constexpr const char* op = "solver_pcg_step_";
  check_float(op, "w", w);
  TORCH_CHECK_VALUE(w.dim() == 2 && w.is_contiguous(), "lissom::", op, ": w must be contiguous [R, C]; got ",
                    shape_of(w), " with strides ", w.strides());
  const int64_t rows = w.size(0), columns = w.size(1);
  check_like(op, "r", r, w.sizes(), w.scalar_type());
  check_like(op, "p", p, w.sizes(), w.scalar_type());
  check_like(op, "q", q, w.sizes(), w.scalar_type());
  check_like(op, "energy", energy, {rows}, w.scalar_type());
  check_like(op, "scale", scale, {columns}, w.scalar_type());
  check_like(op, "pruned", pruned, w.sizes(), at::kBool);
  Tensor norm = at::empty({rows}, w.options());
  with_type(w, [&](auto zero) {
    using T = decltype(zero);
    const Pcg<T> step = {columns,
                         mutable_data<T>(w),
                         mutable_data<T>(r),
                         mutable_data<T>(p),
                         data<T>(q),
                         mutable_data<T>(energy),
                         data<T>(scale),
                         mask_data(pruned),
                         mutable_data<T>(norm)};
    const auto run = kernels<T>(cpu_isa()).pcg_step;
    parallel(rows, kThreadWork / std::max<int64_t>(columns, 1),
             [&](int64_t begin, int64_t end) { run(step, begin, end); });
  });
  return norm;
}

Tensor sparsegpt_block(const Tensor& tile, const Tensor& pruned, const Tensor& factor_in, int64_t kept,
                       int64_t group) {
  constexpr const char* op = "solver_sparsegpt_block_";
  check_float(op, "tile", tile);
  TORCH_CHECK_VALUE(tile.dim() == 2 && tile.is_contiguous(), "lissom::", op,
                    ": tile must be contiguous [B, R]; got ", shape_of(tile), " with strides ",
                    tile.strides());
  const int64_t columns = tile.size(0), rows = tile.size(1);
  check_like(op, "pruned", pruned, tile.sizes(), at::kBool);
  const Tensor factor =
      factor_in.contiguous();  // a corner of a large matrix: its rows fall on the same cache lines
  check_like(op, "factor", factor, {columns, columns}, tile.scalar_type());
  check_group(op, "B", columns, kept, group);
  Tensor errors = at::empty_like(tile);
  const int64_t scratch_entries = sparsegpt_scratch(columns, group);
  const Tensor scratch = at::empty({scratch_entries * at::get_num_threads()}, tile.options());
  with_type(tile, [&](auto zero) {
    using T = decltype(zero);
    const SparseGpt<T> block = {columns,
                                rows,
                                group,
                                group - kept,
                                mutable_data<T>(tile),
                                static_cast<uint8_t*>(pruned.mutable_data_ptr()),
                                data<T>(factor),
                                mutable_data<T>(errors)};
    const auto run = kernels<T>(cpu_isa()).sparsegpt_block;
    T* const room = mutable_data<T>(scratch);
    const int64_t strip_work = std::max<int64_t>(columns, 1) * kStripRows;
    parallel((rows + kStripRows - 1) / kStripRows, kThreadWork / strip_work, [&](int64_t begin, int64_t end) {
      T* const own = room + scratch_entries * at::get_thread_num();
      run(block, begin * kStripRows, std::min(end * kStripRows, rows), own);
    });
  });
  return errors;
}

std::tuple<Tensor, Tensor> masked_solve(const Tensor& h_in, const Tensor& b, const Tensor& chosen) {
  constexpr const char* op = "solver_masked_solve";
  check_float(op, "b", b);
  TORCH_CHECK_VALUE(b.dim() == 2 && b.is_contiguous(), "lissom::", op, ": b must be contiguous [R, C]; got ",
                    shape_of(b), " with strides ", b.strides());
  const int64_t rows = b.size(0), columns = b.size(1);
  check_like(op, "chosen", chosen, b.sizes(), at::kBool);
  const Tensor h = h_in.contiguous();
  check_like(op, "h", h, {columns, columns}, b.scalar_type());
  TORCH_CHECK_VALUE(columns <= kMostColumns, "lissom::", op, ": C must be at most ", kMostColumns, "; got ",
                    columns);
  Tensor x = at::empty_like(b);
  Tensor info = at::empty({rows}, b.options().dtype(at::kInt));
  if (rows == 0 || columns == 0) return {x, info.zero_()};
  const Tensor counts = chosen.sum(1);
  const int64_t* const sizes = data<int64_t>(counts);
  std::vector<int64_t> order(static_cast<size_t>(rows));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t m, int64_t n) { return sizes[m] < sizes[n]; });
  const int64_t units = (rows + kSolveRows - 1) / kSolveRows, threads = at::get_num_threads();
  const int64_t scratch_entries = masked_solve_scratch(sizes[order.back()]);
  const Tensor scratch = at::empty({scratch_entries * std::min(threads, units)}, b.options());
  with_type(b, [&](auto zero) {
    using T = decltype(zero);
    const MaskedSolve<T> problem = {columns, data<T>(h),   data<T>(b),         mask_data(chosen),
                                    sizes,   order.data(), mutable_data<T>(x), mutable_data<int32_t>(info)};
    const auto run = kernels<T>(cpu_isa()).masked_solve;
    T* const room = mutable_data<T>(scratch);
    // A thread takes the next unit when it is done with one, the largest systems first.
    std::atomic<int64_t> taken{0};
    parallel(std::min(threads, units), 1, [&](int64_t begin, int64_t) {
      T* const own = room + scratch_entries * begin;
      for (int64_t n = taken++; n < units; n = taken++) {
        const int64_t first = (units - 1 - n) * kSolveRows;
        run(problem, first, std::min(first + kSolveRows, rows), own);
      }
    });
  });
  return {x, info};
}

}  // namespace

TORCH_LIBRARY_IMPL(lissom, CPU, m) {
  m.impl("solver_admm_step_", admm_step);
  m.impl("solver_pcg_step_", pcg_step);
  m.impl("solver_sparsegpt_block_", sparsegpt_block);
  m.impl("solver_masked_solve", masked_solve);
}

}  // namespace lissom::solver
