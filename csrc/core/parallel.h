// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/Parallel.h>

#include <algorithm>

namespace lissom {

// Runs f(begin, end) over [0, count) on torch's threads, in pieces of at least `grain`. The partition depends only on the
// count and the number of threads, so a thread sees the same weights at every call and results repeat bit for bit.
template <class F>
void parallel(int64_t count, int64_t grain, const F& f) {
  at::parallel_for(0, count, std::max<int64_t>(grain, 1), f);
}

}  // namespace lissom
