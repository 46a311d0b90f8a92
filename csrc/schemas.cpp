// SPDX-License-Identifier: Apache-2.0
// Every operator of the library. Kernels register from their own files; the torch twins from python/lissom/reference.
#include <torch/library.h>

TORCH_LIBRARY(lissom, m) {
  // --- sparse24: y = act(x W^T + bias) + residual with W [N, K] 2:4 sparse along K ---
  // Canonical form of a dense w; pattern "auto" wants w to be 2:4 already, "magnitude" keeps the two largest of a quad.
  m.def("sparse24_compress(Tensor w, *, str pattern=\"auto\") -> (Tensor values, Tensor meta)");
  // Dense [N, K] of a canonical form.
  m.def("sparse24_decompress(Tensor values, Tensor meta, SymInt K) -> Tensor");
  // int64 [3]: is w 2:4 (0/1), first bad row, first bad quad (-1 when none).
  m.def("sparse24_check(Tensor w) -> Tensor");
  // int64 [3]: is every nibble legal (0/1), first bad row, first bad quad.
  m.def("sparse24_check_meta(Tensor meta, SymInt K) -> Tensor");
  // Kernel layout of a target ("cpu-v1", "sm80-v1"; None: of the device), uint8 [bytes]; validates the metadata.
  m.def("sparse24_pack(Tensor values, Tensor meta, str? target=None) -> Tensor");
  // Inverse of pack. dtype may be left out where the header can be read (not while tracing).
  m.def(
      "sparse24_unpack(Tensor packed, SymInt N, SymInt K, str? target=None, *, ScalarType? dtype=None)"
      " -> (Tensor values, Tensor meta)");
  // The GEMM. x [..., K] -> y [..., N] in x's type, or float32 by out_dtype.
  m.def(
      "sparse24_linear(Tensor x, Tensor packed, SymInt N, SymInt K, Tensor? bias=None, str act=\"none\","
      " Tensor? residual=None, *, ScalarType? out_dtype=None) -> Tensor");
  // x and W in int8: y = act(scale_x[m] scale_w[n] (x W^T) + bias) + residual, sums in int32, y in float32 by default.
  m.def(
      "sparse24_linear_int8(Tensor x, Tensor scale_x, Tensor packed, Tensor scale_w, SymInt N, SymInt K,"
      " Tensor? bias=None, str act=\"none\", Tensor? residual=None, *, ScalarType? out_dtype=None) -> "
      "Tensor");
  // Symmetric int8 of each row: x / scale to nearest even, scale = largest magnitude / 127.
  m.def("sparse24_quantize_rows(Tensor x) -> (Tensor q, Tensor scale)");
  // sparse24_linear from the canonical form, for training: differentiable in values.
  m.def("sparse24_linear_values(Tensor x, Tensor values, Tensor meta, Tensor? bias=None) -> Tensor");
  // dx [..., K] = dy [..., N] W: dense speed, blocks of W at a time.
  m.def("sparse24_grad_input(Tensor dy, Tensor packed, SymInt N, SymInt K) -> Tensor");
  // dvalues [N, K/2] = (dy^T x) at the kept positions, blocks of rows at a time.
  m.def("sparse24_mask_mm(Tensor dy, Tensor x, Tensor meta) -> Tensor");

  // --- pruning: which weights an n:m pattern can keep ---
  // int64 [C]: an order of the columns of uint8 scores [R, C] in which groups of neighbours keep more.
  m.def("pruning_permute(Tensor levels, SymInt kept, SymInt group, SymInt rounds, SymInt window) -> Tensor");

  // --- solver: inner loops of the pruning solvers, on weights [R, C] ---
  // One step of ADMM: z = x + u, mask, scaled dual u and right-hand side. int64 []: entries that changed sides.
  m.def(
      "solver_admm_step_(Tensor x, Tensor(a!) u, Tensor? b, Tensor(b!) rhs, float rho, float rho_next,"
      " SymInt kept, SymInt group, Tensor? forced=None) -> Tensor");
  // One step of conjugate gradients behind q = p H. [R]: <r, r> of each row.
  m.def(
      "solver_pcg_step_(Tensor(a!) w, Tensor(b!) r, Tensor(c!) p, Tensor q, Tensor(d!) energy, Tensor scale,"
      " Tensor pruned) -> Tensor");
  // SparseGPT's pass over one block of columns, columns first. [B, R]: the errors that the columns behind absorb.
  m.def(
      "solver_sparsegpt_block_(Tensor(a!) tile, Tensor(b!) pruned, Tensor factor, SymInt kept, SymInt group)"
      " -> Tensor");
  // x_S = b_S inv(H[S, S]) for the set S that the mask chooses in each row; int32 [R]: 0, or where it failed.
  m.def("solver_masked_solve(Tensor h, Tensor b, Tensor chosen) -> (Tensor x, Tensor info)");
}
