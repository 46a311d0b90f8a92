// SPDX-License-Identifier: Apache-2.0
#include "core/simd_avx2.h"
#include "solver/solver.h"

namespace lissom::solver::avx2 {
namespace {

constexpr int kBytes = 32;  // of a vector

#include "solver/cpu/solver_vectors.inc"

#include "solver/cpu/solver_admm.inc"
#include "solver/cpu/solver_cholesky.inc"
#include "solver/cpu/solver_pcg.inc"
#include "solver/cpu/solver_sparsegpt.inc"

}  // namespace

extern const Kernels<float> kFloat;
extern const Kernels<double> kDouble;
const Kernels<float> kFloat = {admm_step<float>, pcg_step<float>, sparsegpt_block<float>,
                               masked_solve<float>};
const Kernels<double> kDouble = {admm_step<double>, pcg_step<double>, sparsegpt_block<double>,
                                 masked_solve<double>};

}  // namespace lissom::solver::avx2
