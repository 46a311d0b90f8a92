// SPDX-License-Identifier: Apache-2.0
// What the host side may call: raw pointers and sizes in elements, all arrays contiguous unless a stride is named.
// Torch-free.
#pragma once

#include <stdint.h>

#include "core/cpu_isa.h"

namespace lissom::solver {

// Groups up to this size are chosen by comparing pairs, longer ones by selection (which needs scratch).
constexpr int64_t kRankedGroup = 32;

// One step of ADMM on `count` entries that fall into groups of `group` neighbours. With z = x + u the entries of each
// group that have the least |z| are pruned, `gone` of them; among equals the first ones go; forced entries go before all
// others, and all of them.
//   u   = pruned ? z * rho / rho_next : 0        scaled dual; a pruned z of 0 is stored as -0, so that u tells the mask
//   rhs = b + (pruned ? -rho : rho_next) * z     rhs may be x
template <class T>
struct Admm {
  int64_t count, group, gone;
  const T* x;
  T* u;
  const T* b;  // or null: 0
  T* rhs;
  const uint8_t* forced;  // or null
  T rho, rho_next;
};

// One step of conjugate gradients on w_S H_SS = b_S of every row, S the entries that are not pruned, with the diagonal of
// H as preconditioner. q = p H; energy = <r, scale r>, of a solved row 0: such rows stay as they are.
template <class T>
struct Pcg {
  int64_t columns;
  T *w, *r, *p;  // [rows, columns]; r and p are 0 where pruned
  const T* q;
  T* energy;       // [rows]
  const T* scale;  // [columns], 1 / diag(H)
  const uint8_t* pruned;
  T* norm;  // [rows]: the new <r, r>
};

// The pass of SparseGPT over the columns of one block, columns first. Column by column the pruned weights are given up and
// the columns behind take up their errors:
//   error_j = pruned_j ? w_j / U_jj : 0,   w_k -= U_jk error_j for k > j
// When the pass reaches a group, its `gone` entries of least |w| / U_jj are pruned; those that are marked before go first,
// and all of them. What is pruned becomes 0.
template <class T>
struct SparseGpt {
  int64_t columns, rows, group, gone;
  T* tile;          // [columns, rows]
  uint8_t* pruned;  // [columns, rows]
  const T* factor;  // U [columns, columns], upper triangular
  T* errors;        // [columns, rows]
};
constexpr int64_t kStripRows = 64;  // at most, of all tiers and types
inline constexpr int64_t sparsegpt_scratch(int64_t columns, int64_t group) {
  return (3 * columns + group) * kStripRows;
}

// x_S with H[S, S] x_S = b_S for every row, S what the mask chooses; 0 elsewhere. A row whose H[S, S] is not positive
// definite gets NaN on S.
template <class T>
struct MaskedSolve {
  int64_t columns;
  const T* h;             // [columns, columns], columns^2 < 2^31
  const T* b;             // [rows, columns]
  const uint8_t* chosen;  // [rows, columns]
  const int64_t* counts;  // [rows]: |S|
  const int64_t* order;   // [rows]: rows by ascending |S|
  T* x;                   // [rows, columns]
  int32_t* info;          // [rows]: 0, or 1 + the first pivot that is not positive
};
constexpr int64_t kSolveRows = 16;  // at most, that are solved in step
inline constexpr int64_t masked_solve_scratch(int64_t largest) {
  const int64_t size = largest + 3;
  return (3 * size + size * (size + 1) / 2) * kSolveRows;
}

template <class T>
struct Kernels {
  // Entries [begin, end), whole groups. scratch: 2 * group entries if group > kRankedGroup. Returns how many entries
  // changed between kept and pruned.
  int64_t (*admm_step)(const Admm<T>&, int64_t begin, int64_t end, T* scratch);
  void (*pcg_step)(const Pcg<T>&, int64_t row_begin, int64_t row_end);
  // Rows [begin, end), begin a multiple of kStripRows. scratch: sparsegpt_scratch entries, aligned to 64 bytes.
  void (*sparsegpt_block)(const SparseGpt<T>&, int64_t begin, int64_t end, T* scratch);
  // Rows order[begin, end), begin a multiple of kSolveRows. scratch: masked_solve_scratch entries for the largest |S|,
  // aligned to 64 bytes.
  void (*masked_solve)(const MaskedSolve<T>&, int64_t begin, int64_t end, T* scratch);
};

template <class T>
const Kernels<T>& kernels(CpuIsa isa);  // float, double

}  // namespace lissom::solver
