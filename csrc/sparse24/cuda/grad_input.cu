// SPDX-License-Identifier: Apache-2.0
#include "sparse24/cuda/grad_input.cuh"

#include "sparse24/cuda/launch.h"

using namespace lissom;
using namespace lissom::sparse24;

namespace {

template <class T, int Rows>
int run(const dense::Matrix& dy, const unsigned char* records, uint16_t* dx, int64_t k, void* stream) {
  using S = GradInput<Rows>;
  const int64_t tiles = (dy.rows + S::kRows - 1) / S::kRows * ((k + S::kColumns - 1) / S::kColumns);
  return dev::launch(grad_input_kernel<T, Rows>, {tiles}, S::kThreads, S::kSharedBytes, stream, dy, records,
                     dx, k);
}

}  // namespace

extern "C" int lissom_sparse24_grad_input(DType dtype, int tile_rows, const void* dy, int64_t dy_stride,
                                          const void* records, void* dx, int64_t m, int64_t n, int64_t k,
                                          void* stream) {
  if (m == 0 || k == 0) return 0;
  if (element_bytes(dtype) != 2 || dy_stride % 8 || (tile_rows != 64 && tile_rows != 128))
    return kWrongArgument;
  const bool bf16 = dtype == DType::bf16;
  const auto launcher = tile_rows == 64 ? bf16 ? run<dev::bf16, 64> : run<dev::f16, 64>
                        : bf16          ? run<dev::bf16, 128>
                                        : run<dev::f16, 128>;
  return launcher({static_cast<const uint16_t*>(dy), m, n, dy_stride},
                  static_cast<const unsigned char*>(records), static_cast<uint16_t*>(dx), k, stream);
}
