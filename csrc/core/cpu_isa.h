// SPDX-License-Identifier: Apache-2.0
// What this CPU can do, what it is good at, and which tier the kernels use. Compiled without ISA flags.
#pragma once

#include <stdint.h>

namespace lissom {

// Tiers, each including the ones before it.
enum class CpuIsa : int32_t {
  portable,  // any x86-64, any other CPU
  avx2,      // + FMA, F16C
  avx512,    // F, BW, VL, DQ
  avx512x,   // + VBMI2, VNNI, BF16: Zen 4+, Sapphire Rapids+
  amx,       // + AMX tiles with BF16 and INT8
};
constexpr int kCpuIsaCount = 5;

const char* isa_name(CpuIsa isa);
bool isa_from_name(const char* name, CpuIsa* isa);

CpuIsa detected_isa();         // best tier of this CPU and operating system
CpuIsa cpu_isa();              // tier in use: detected, capped by LISSOM_CPU_ISA, or what set_cpu_isa chose
bool set_cpu_isa(CpuIsa isa);  // false if this CPU lacks the tier

// Which kernel wins depends on the ports of the core, not on its instruction set. One row a kind of core: the number of
// tokens M from which each family's alternative path is the faster one. Measured rows name their machine in
// docs/kernels/; `lissom bench tune` prints the row of an unknown core.
struct CorePlan {
  const char* core;
  bool measured;
  bool bf16_dot;            // the bf16 dot instruction is as fast as an FMA
  int64_t lanes_from_f32;   // sparse24: lanes-over-tokens path from this M
  int64_t lanes_from_bf16;  // the same where the bf16 dot and AMX are not used
  int64_t lanes_from_f16;
  int64_t lanes_from_int8;  // where there is no dot product of bytes
  int64_t tiles_from_int8;  // AMX from this M, the dot product of bytes below
};
const CorePlan& core_plan();
const char* cpu_model_name();

}  // namespace lissom
