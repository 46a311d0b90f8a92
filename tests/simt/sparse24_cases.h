// SPDX-License-Identifier: Apache-2.0
// For tests of the 2:4 kernels on the executor: random 2:4 weights, inputs whose sums are exact, ways to run a launch, and leaving
// out barriers and waits. Include before a kernel's file, whose LISSOM_SYNC and LISSOM_WAIT this defines.
#pragma once

#include <stdio.h>
#include <string.h>

#include <functional>
#include <random>
#include <string>
#include <vector>

#include "core/types.h"
#include "simt.h"

namespace cases {

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized =
    true;  // ten times as slow: fewer cases will do, as the sanitizers do not depend on the schedule
#else
constexpr bool kSanitized = false;
#endif

// Number of the statement that is left out (a wait may instead be one group too weak); 0: none.
inline int left_out = 0;
inline bool weaker = false;

}  // namespace cases

#define LISSOM_SYNC(number, statement) \
  do {                                 \
    if (cases::left_out != (number)) { \
      statement;                       \
    }                                  \
  } while (false)
#define LISSOM_WAIT(number, groups)       \
  do {                                    \
    if (cases::left_out != (number))      \
      dev::cp_async_wait<groups>();       \
    else if (cases::weaker)               \
      dev::cp_async_wait<(groups) + 1>(); \
  } while (false)

namespace cases {

using lissom::DType;

struct Way {
  simt::Schedule schedule;
  simt::Landing landing;
  uint64_t seed;
};
// Forward, reverse and `priorities` random schedules, each landing in turn.
inline std::vector<Way> ways(int priorities) {
  using simt::Landing, simt::Schedule;
  const Landing landings[] = {Landing::early, Landing::late, Landing::random};
  std::vector<Way> all;
  for (Landing landing : landings) {
    all.push_back({Schedule::forward, landing, 1});
    all.push_back({Schedule::reverse, landing, 1});
  }
  for (int i = 0; i < priorities; ++i)
    all.push_back({Schedule::random, landings[i % 3], static_cast<uint64_t>(i + 1)});
  return all;
}

inline std::string describe(const Way& w) {
  const char* schedules[] = {"forward", "reverse", "random"};
  const char* landings[] = {"early", "late", "random"};
  return std::string(schedules[static_cast<int>(w.schedule)]) + " schedule, " +
         landings[static_cast<int>(w.landing)] + " landing, seed " + std::to_string(w.seed);
}

// "" if `launch` ran as a GPU must, and `right` holds behind it; else what was wrong.
inline std::string attempt(const Way& way, const std::function<int()>& launch,
                           const std::function<std::string()>& right, bool detector = true) {
  simt::Run run;
  run.schedule = way.schedule;
  run.landing = way.landing;
  run.seed = way.seed;
  run.detector = detector;
  const int error = launch();
  if (run.fault) return run.fault->text;
  if (error) return "the launch returned error " + std::to_string(error);
  return right();
}

class Random {
 public:
  explicit Random(uint64_t seed) : engine_(seed) {}
  uint32_t below(uint32_t n) { return static_cast<uint32_t>(engine_() % n); }
  // Multiples of 1/64 in [-1, 1]: sums of up to 4096 products are exact in float in any order.
  float exact() { return (static_cast<int>(below(129)) - 64) / 64.0f; }
  uint32_t bits() { return static_cast<uint32_t>(engine_()); }

 private:
  std::mt19937_64 engine_;
};

inline uint16_t to_bits(DType t, float v) {
  return t == DType::bf16 ? lissom::float_to_bf16(v) : lissom::float_to_f16(v);
}
inline float to_float(DType t, uint16_t bits) {
  return t == DType::bf16 ? lissom::bf16_to_float(bits) : lissom::f16_to_float(bits);
}

constexpr uint32_t kNibbles[6] = {0x4, 0x8, 0x9, 0xC, 0xD, 0xE};

inline int64_t meta_columns(int64_t k) { return (k + 7) / 8; }
inline std::vector<uint8_t> random_meta(int64_t n, int64_t k, Random& random) {
  std::vector<uint8_t> meta(static_cast<size_t>(n * meta_columns(k)), 0);
  for (int64_t row = 0; row < n; ++row)
    for (int64_t q = 0; q < k / 4; ++q)
      meta[static_cast<size_t>(row * meta_columns(k) + q / 2)] |=
          static_cast<uint8_t>(kNibbles[random.below(6)] << (4 * (q % 2)));
  return meta;
}
inline uint32_t nibble_at(const uint8_t* meta, int64_t k, int64_t row, int64_t quad) {
  return meta[row * meta_columns(k) + quad / 2] >> (4 * (quad % 2)) & 15u;
}
// Dense column of kept value `slot` of a quad.
inline int64_t column_of(const uint8_t* meta, int64_t k, int64_t row, int64_t quad, int slot) {
  const uint32_t nibble = nibble_at(meta, k, row, quad);
  return 4 * quad + (slot ? nibble >> 2 : nibble & 3u);
}

// Prints and counts failures; a test ends with `return cases::verdict(name)`.
inline int failures = 0, checks = 0;
inline void expect(const std::string& what, const std::string& trouble) {
  ++checks;
  if (trouble.empty()) return;
  if (++failures <= 5) printf("FAILED %s: %s\n", what.c_str(), trouble.c_str());
}
inline int verdict(const char* name) {
  printf("%s: %d checks, %d failed\n", name, checks, failures);
  return failures != 0;
}

}  // namespace cases
