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
extern const Path kDot, kDotInt8;
}
namespace amx {
extern const Path kTiles, kTilesInt8;
}
#endif

const Kernels& kernels(CpuIsa isa) {
#if defined(__x86_64__)
  static const Kernels with_dot = [] {
    Kernels all = avx512::kKernels;
    all.dot[static_cast<int>(DType::bf16)] = &avx512x::kDot;
    all.dot[static_cast<int>(DType::i8)] = &avx512x::kDotInt8;
    return all;
  }();
  static const Kernels with_tiles = [] {
    Kernels all = with_dot;
    all.tiles[static_cast<int>(DType::bf16)] = &amx::kTiles;
    all.tiles[static_cast<int>(DType::i8)] = &amx::kTilesInt8;
    return all;
  }();
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
  const int t = static_cast<int>(dtype);
  switch (forced.load(std::memory_order_relaxed)) {
    case 1: return all.permuted[t];
    case 2: return all.lanes[t];
    case 3: return all.dot[t];
    case 4: return all.tiles[t];
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
  const int t = static_cast<int>(dtype);
  const Path* wanted = forced_path(all, dtype);
  if (wanted && (finite || wanted != all.tiles[t])) return *wanted;
  const CorePlan& plan = core_plan();
  const bool int8 = dtype == DType::i8;
  if (all.tiles[t] && finite && (!int8 || m >= plan.tiles_from_int8)) return *all.tiles[t];
  // The dot product of bytes is fast wherever it exists, that of bf16 is not.
  if (all.dot[t] && (int8 || plan.bf16_dot)) return *all.dot[t];
  const int64_t from[kTypeCount] = {plan.lanes_from_f32, plan.lanes_from_bf16, plan.lanes_from_f16,
                                    plan.lanes_from_int8};
  return m >= from[t] ? *all.lanes[t] : *all.permuted[t];
}

}  // namespace lissom::sparse24
