// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>
#include <c10/util/Exception.h>
#include <torch/csrc/stable/c/shim.h>

#include <algorithm>

namespace lissom {

// Runs f(begin, end) over [0, count) on torch's threads, in pieces of at least `grain`. The partition depends only on the
// count and the number of threads, so a thread sees the same weights at every call and results repeat bit for bit.
//
// f must not throw nor touch tensors. Called through torch's own library: at::parallel_for is an inline function that runs
// serially unless the including unit is compiled for OpenMP, and a second OpenMP runtime would not know
// torch.set_num_threads.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  const auto call = [](int64_t begin, int64_t end, void* body) {
    (*static_cast<const F*>(body))(begin, end);
  };
  const auto error = torch_parallel_for(0, count, std::max<int64_t>(grain, 1), call, const_cast<F*>(&f));
  TORCH_CHECK(error == 0, "lissom: torch could not run a parallel region");
}

}  // namespace lissom
