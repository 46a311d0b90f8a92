// SPDX-License-Identifier: Apache-2.0
#include "sparse24/cuda/gemv.cuh"

namespace lissom::sparse24 {
namespace {

template <class T, int kTokens>
int start_gemv(const Work& work, void* stream) {
  using Block = Gemv<T, kTokens>;
  return dev::launch(&sparse24_gemv<T, kTokens>, {work.panels}, Block::kThreads, Block::kSharedBytes, stream,
                     work);
}
template <class T>
int choose_gemv(const Work& work, void* stream) {
  if (work.p.m == 1) return start_gemv<T, 1>(work, stream);
  if (work.p.m == 2) return start_gemv<T, 2>(work, stream);
  return start_gemv<T, 4>(work, stream);
}

}  // namespace
}  // namespace lissom::sparse24

using namespace lissom::sparse24;

int lissom_sparse24_gemv(const LissomLinear* linear, void* stream) {
  const LissomLinear& p = *linear;
  if (p.m == 0 || p.n == 0) return 0;
  if (p.m > kGemvTokens || p.dtype == static_cast<int>(lissom::DType::i8) || !valid(p, 8))
    return kWrongArgument;
  const Work work = work_of(p, 1, nullptr);
  return p.dtype == static_cast<int>(lissom::DType::bf16) ? choose_gemv<lissom::dev::bf16>(work, stream)
                                                          : choose_gemv<lissom::dev::f16>(work, stream);
}
