// SPDX-License-Identifier: Apache-2.0
// Which path runs: what the tier has, and what the core is good at. Compiled without ISA flags.
#include <atomic>
#include <cstring>

#include "sparse24/sparse24.h"

namespace lissom::sparse24 {

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
namespace avx512x {
extern const Path kDot;
}
namespace amx {
extern const Path kTiles;
}
#endif

const Kernels& kernels(CpuIsa isa) {
#if defined(__x86_64__)
  static const Kernels with_dot = {
      {avx512::kKernels.permuted[0], avx512::kKernels.permuted[1], avx512::kKernels.permuted[2]},
      {avx512::kKernels.lanes[0], avx512::kKernels.lanes[1], avx512::kKernels.lanes[2]},
      &avx512x::kDot,
      nullptr};
  static const Kernels with_tiles = {{with_dot.permuted[0], with_dot.permuted[1], with_dot.permuted[2]},
                                     {with_dot.lanes[0], with_dot.lanes[1], with_dot.lanes[2]},
                                     with_dot.dot,
                                     &amx::kTiles};
  switch (isa) {
    case CpuIsa::portable: return portable::kKernels;
    case CpuIsa::avx2: return avx2::kKernels;
    case CpuIsa::avx512: return avx512::kKernels;
    case CpuIsa::avx512x: return with_dot;
    case CpuIsa::amx: return with_tiles;
  }
#endif
  (void)isa;
  return portable::kKernels;
}

namespace {

constexpr const char* kPathNames[] = {"", "permuted", "lanes", "permuted-dot", "tiles"};
std::atomic<int> forced{0};

const Path* forced_path(const Kernels& all, DType dtype) {
  const bool bf16 = dtype == DType::bf16;
  switch (forced.load(std::memory_order_relaxed)) {
    case 1: return all.permuted[static_cast<int>(dtype)];
    case 2: return all.lanes[static_cast<int>(dtype)];
    case 3: return bf16 ? all.dot : nullptr;
    case 4: return bf16 ? all.tiles : nullptr;
    default: return nullptr;
  }
}

}  // namespace

bool force_path(const char* name) {
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(name, kPathNames[i]) != 0) continue;
    forced.store(i, std::memory_order_relaxed);
    return true;
  }
  return false;
}

const Path& choose_path(CpuIsa isa, DType dtype, int64_t m, bool finite) {
  const Kernels& all = kernels(isa);
  const Path* wanted = forced_path(all, dtype);
  if (wanted && (finite || wanted != all.tiles)) return *wanted;
  const CorePlan& plan = core_plan();
  const int t = static_cast<int>(dtype);
  if (dtype == DType::bf16 && all.tiles && finite) return *all.tiles;
  if (dtype == DType::bf16 && all.dot && plan.bf16_dot) return *all.dot;
  const int64_t from = dtype == DType::f32    ? plan.lanes_from_f32
                       : dtype == DType::bf16 ? plan.lanes_from_bf16
                                              : plan.lanes_from_f16;
  return m >= from ? *all.lanes[t] : *all.permuted[t];
}

}  // namespace lissom::sparse24
