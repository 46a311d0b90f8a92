// SPDX-License-Identifier: Apache-2.0
#include "core/cpu_isa.h"

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace lissom {
namespace {

constexpr const char* kNames[kCpuIsaCount] = {"portable", "avx2", "avx512", "avx512x", "amx"};
constexpr int64_t kNever = INT64_MAX;

// Two shuffle ports make permuted activations the best everywhere; on one shuffle port they lose to lanes over tokens
// as soon as a few vectors of tokens share each decoded weight.
constexpr CorePlan kPlans[] = {
    {"AMD Zen 4/5", false, true, kNever, kNever, kNever, kNever, kNever},
    {"Intel Golden Cove family", true, false, 28, 28, 28, 128, 9},
    {"unknown AVX-512 core", false, false, 48, 48, 48, 128, 9},
    {"AVX2 core", true, false, 12, 12, 12, 28, kNever},
    {"portable", true, false, 10, 10, 10, 4, kNever},
};
enum PlanRow { kZen, kGoldenCove, kUnknownAvx512, kAvx2Core, kPortableCore };

struct Cpu {
  CpuIsa isa = CpuIsa::portable;
  bool amd = false, intel = false;
  unsigned family = 0;
  char name[49] = "unknown CPU";
};

#if defined(__x86_64__)
bool bit(unsigned reg, int i) { return (reg >> i) & 1u; }

uint64_t enabled_state() {  // XCR0: register files that the operating system saves
  unsigned a, d;
  __asm__ volatile("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
  return static_cast<uint64_t>(d) << 32 | a;
}

// Linux hands out the 8 KiB of tile state only on request, once per process.
bool request_tile_state() {
#if defined(__linux__)
  constexpr long kArchReqXcompPerm = 0x1023, kXfeatureXtileData = 18;
  return syscall(SYS_arch_prctl, kArchReqXcompPerm, kXfeatureXtileData) == 0;
#else
  return false;
#endif
}

Cpu detect() {
  Cpu cpu;
  unsigned a, b, c, d;
  if (!__get_cpuid(0, &a, &b, &c, &d)) return cpu;
  const unsigned max_leaf = a;
  char vendor[13] = {};
  memcpy(vendor, &b, 4), memcpy(vendor + 4, &d, 4), memcpy(vendor + 8, &c, 4);
  cpu.amd = !strcmp(vendor, "AuthenticAMD");
  cpu.intel = !strcmp(vendor, "GenuineIntel");
  __get_cpuid(1, &a, &b, &c, &d);
  cpu.family = ((a >> 8) & 15u) + (((a >> 8) & 15u) == 15u ? (a >> 20) & 255u : 0u);
  const bool osxsave = bit(c, 27), fma = bit(c, 12), f16c = bit(c, 29), avx = bit(c, 28);
  for (unsigned i = 0; i < 3; ++i) {
    unsigned r[4];
    if (!__get_cpuid(0x80000002u + i, &r[0], &r[1], &r[2], &r[3])) break;
    memcpy(cpu.name + 16 * i, r, 16);
  }
  if (!osxsave || !avx || !fma || !f16c || max_leaf < 7) return cpu;
  const uint64_t state = enabled_state();
  __get_cpuid_count(7, 0, &a, &b, &c, &d);
  const unsigned ebx = b, ecx = c, edx = d;
  if ((state & 0x6) != 0x6 || !bit(ebx, 5)) return cpu;
  cpu.isa = CpuIsa::avx2;
  const bool avx512 = bit(ebx, 16) && bit(ebx, 17) && bit(ebx, 30) && bit(ebx, 31);  // F, DQ, BW, VL
  if ((state & 0xe6) != 0xe6 || !avx512) return cpu;
  cpu.isa = CpuIsa::avx512;
  __get_cpuid_count(7, 1, &a, &b, &c, &d);
  if (!bit(ecx, 6) || !bit(ecx, 11) || !bit(a, 5)) return cpu;  // VBMI2, VNNI, BF16
  cpu.isa = CpuIsa::avx512x;
  const bool tiles = bit(edx, 24) && bit(edx, 22) && bit(edx, 25);  // AMX-TILE, AMX-BF16, AMX-INT8
  if (tiles && (state & 0x60000) == 0x60000 && request_tile_state()) cpu.isa = CpuIsa::amx;
  return cpu;
}
#else
Cpu detect() { return {}; }
#endif

const Cpu& cpu() {
  static const Cpu detected = detect();
  return detected;
}

CpuIsa initial_isa() {
  const char* cap = std::getenv("LISSOM_CPU_ISA");
  if (cap == nullptr || *cap == '\0') return cpu().isa;
  CpuIsa wanted;
  if (!isa_from_name(cap, &wanted)) {
    std::fprintf(stderr,
                 "lissom: LISSOM_CPU_ISA=%s is not one of portable, avx2, avx512, avx512x, amx; using %s\n",
                 cap, isa_name(cpu().isa));
    return cpu().isa;
  }
  return wanted < cpu().isa ? wanted : cpu().isa;
}

std::atomic<CpuIsa>& current() {
  static std::atomic<CpuIsa> isa{initial_isa()};
  return isa;
}

}  // namespace

const char* isa_name(CpuIsa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_from_name(const char* name, CpuIsa* isa) {
  for (int i = 0; i < kCpuIsaCount; ++i) {
    if (std::strcmp(name, kNames[i]) != 0) continue;
    *isa = static_cast<CpuIsa>(i);
    return true;
  }
  return false;
}

CpuIsa detected_isa() { return cpu().isa; }
CpuIsa cpu_isa() { return current().load(std::memory_order_relaxed); }

bool set_cpu_isa(CpuIsa isa) {
  if (isa > cpu().isa) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

const CorePlan& core_plan() {
  const CpuIsa isa = cpu_isa();
  if (isa == CpuIsa::portable) return kPlans[kPortableCore];
  if (isa == CpuIsa::avx2) return kPlans[kAvx2Core];
  if (cpu().amd) return kPlans[kZen];  // every AMD core with AVX-512 is Zen 4 or later
  if (cpu().intel && cpu().isa >= CpuIsa::avx512x) return kPlans[kGoldenCove];
  return kPlans[kUnknownAvx512];
}

const char* cpu_model_name() { return cpu().name; }

}  // namespace lissom
