// SPDX-License-Identifier: Apache-2.0
#include "sparse24/cuda/gemm.cuh"

#include <utility>

namespace lissom::sparse24 {
namespace {

template <class T, int Index>
int start_gemm(const Work& work, void* stream) {
  const Tile& t = kTiles[Index];
  const int64_t down = (32 * work.panels + t.rows - 1) / t.rows;
  const int64_t across = (work.p.m + t.tokens - 1) / t.tokens;
  const int error = dev::launch(&sparse24_gemm<T, Index>, {down * across, work.splits}, threads(t),
                                Gemm<T, Index>::kSharedBytes, stream, work);
  if (error || work.splits == 1) return error;
  const int64_t pieces = work.p.m * work.panels * 8;
  return dev::launch(&sparse24_reduce<typename Element<T>::Sum>,
                     {(pieces + kReduceThreads - 1) / kReduceThreads}, kReduceThreads, 0, stream, work);
}

template <class T, int... Index>
int choose_gemm(int tile, const Work& work, void* stream, std::integer_sequence<int, Index...>) {
  using Start = int (*)(const Work&, void*);
  constexpr Start kStarts[] = {&start_gemm<T, Index>...};
  return kStarts[tile](work, stream);
}

}  // namespace
}  // namespace lissom::sparse24

using namespace lissom::sparse24;

int64_t lissom_sparse24_gemm_workspace(int64_t m, int64_t n, int splits) {
  return splits > 1 ? 4 * splits * m * 32 * sm80::panels(n) : 0;
}

int lissom_sparse24_gemm(const LissomLinear* linear, int tile, int splits, void* workspace,
                         int64_t workspace_bytes, void* stream) {
  const LissomLinear& p = *linear;
  if (p.m == 0 || p.n == 0) return 0;
  if (!valid(p, 16) || tile < 0 || tile >= kTileCount || splits < 1 || !aligned(workspace, 16) ||
      workspace_bytes < lissom_sparse24_gemm_workspace(p.m, p.n, splits))
    return kWrongArgument;
  const Work work = work_of(p, splits, workspace);
  constexpr std::make_integer_sequence<int, kTileCount> kAll{};
  if (p.dtype == static_cast<int>(lissom::DType::i8)) return choose_gemm<int8_t>(tile, work, stream, kAll);
  return p.dtype == static_cast<int>(lissom::DType::bf16)
             ? choose_gemm<lissom::dev::bf16>(tile, work, stream, kAll)
             : choose_gemm<lissom::dev::f16>(tile, work, stream, kAll);
}
