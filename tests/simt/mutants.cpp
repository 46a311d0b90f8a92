// SPDX-License-Identifier: Apache-2.0
// Runs the kernels of kernels.cuh, right and with each planted fault, under every schedule and landing. One line for each:
//   name  runs  reported  wrong values only  kind of the first report
// Arguments: names to run (all when none); --no-detector: judge by values alone; --plain-memory: buffers without known bounds,
// so that AddressSanitizer is the one to notice.
#include <stdio.h>
#include <string.h>

#include <functional>
#include <memory>
#include <random>
#include <vector>

#include "kernels.cuh"
#include "simt.h"

using namespace lissom;
using plants::Plant;

namespace {

bool plain_memory = false, detector = true;

template <class T>
struct Memory {  // exact to the byte in both forms
  explicit Memory(size_t n, T fill = T{}) : plain(plain_memory ? n : 0, fill) {
    if (!plain_memory) known = std::make_unique<simt::Buffer<T>>(n, fill);
  }
  T* data() { return plain_memory ? plain.data() : known->data(); }
  T& operator[](size_t i) { return data()[i]; }
  std::vector<T> plain;
  std::unique_ptr<simt::Buffer<T>> known;
};

float draw(std::mt19937& random) { return static_cast<int>(random() % 129 - 64) / 64.0f; }

// Each returns "the values are right", after a launch in the current run.
template <Plant P>
bool try_sum() {
  const int n = 100, blocks = 2;
  Memory<float> x(n), y(blocks);
  float all = 0;
  for (int i = 0; i < n; ++i) all += x[i] = static_cast<float>(i % 7) - 2;
  if (dev::launch(plants::sum<P>, dev::Grid{blocks}, 128, 16, nullptr, x.data(), y.data(), n) != 0)
    return false;
  return y[0] == all && y[1] == all + 1;
}

template <Plant P>
bool try_relay() {
  Memory<float> x(32), y(33);
  int positive = 0;
  for (int i = 0; i < 32; ++i) positive += (x[i] = static_cast<float>(i * 5 % 11) - 5) > 0;
  if (dev::launch(plants::relay<P>, dev::Grid{}, 64, 260, nullptr, x.data(), y.data()) != 0) return false;
  bool right = y[32] == static_cast<float>(positive);
  for (int i = 0; i < 32; ++i) right &= y[i] == x[31 - i] + x[31 - (i ^ 1)];
  return right;
}

template <Plant P>
bool try_ring() {
  using T = dev::bf16;
  const int tokens = 17, k = 208, steps = (k + 31) / 32;  // one token and 16 columns over
  std::mt19937 random(3);
  Memory<T> values(32 * k / 2), x(tokens * k);
  Memory<uint32_t> meta(32 * steps, 0xeeeeeeeeu);
  Memory<float> y(tokens * 32);
  std::vector<float> dense(32 * k);
  for (int row = 0; row < 32; ++row)
    for (int quad = 0; quad < k / 4; ++quad) {
      const uint32_t nibbles[6] = {4, 8, 9, 12, 13, 14}, nibble = nibbles[random() % 6];
      for (int slot = 0; slot < 2; ++slot) {
        const float v = draw(random);
        values[row * k / 2 + 2 * quad + slot] = dev::from_float<T>(v);
        dense[row * k + 4 * quad + (nibble >> 2 * slot & 3)] = v;
      }
      // The word image of 32 x 32: lane 4g + 2f + s has rows 16f + g and 16f + g + 8, columns 16s .. 16s+15.
      const int in = quad % 8, lane = row % 8 * 4 + row / 16 * 2 + in / 4,
                shift = row / 8 % 2 * 16 + in % 4 * 4;
      uint32_t& word = meta[quad / 8 * 32 + lane];
      word = (word & ~(15u << shift)) | nibble << shift;
    }
  std::vector<float> numbers(tokens * k);
  for (int i = 0; i < tokens * k; ++i) x[i] = dev::from_float<T>(numbers[i] = draw(random));
  const auto kernel = plants::ring<P, T>;
  if (dev::launch(kernel, dev::Grid{(tokens + 15) / 16}, 64, plants::kRingBytes, nullptr, values.data(),
                  meta.data(), x.data(), y.data(), tokens, k) != 0)
    return false;
  for (int t = 0; t < tokens; ++t)
    for (int row = 0; row < 32; ++row) {
      double sum = 0;
      for (int c = 0; c < k; ++c) sum += double{numbers[t * k + c]} * dense[row * k + c];
      if (y[t * 32 + row] != sum) return false;
    }
  // The ring's design is without bank conflicts; a report of its own, since no value shows it.
  const simt::Counters& counters = simt::Run::current()->counters("ring");
  const auto main_loop = [&](const char* operation) {
    return counters.total(simt::Space::shared, operation);
  };
  for (const char* operation : {"ldmatrix", "cp_async", "store", "load"}) {
    const simt::Traffic t = main_loop(operation);
    if (t.units > t.ideal) {
      simt::Run::current()->fault = simt::Fault{simt::Kind::operand, 0, "bank conflicts"};
      return false;
    }
  }
  return true;
}

struct Case {
  const char* name;
  bool (*run)();
};
#define SUM(plant) {"sum." #plant, try_sum<Plant::plant>}
#define RELAY(plant) {"relay." #plant, try_relay<Plant::plant>}
#define RING(plant) {"ring." #plant, try_ring<Plant::plant>}
constexpr Case kCases[] = {
    SUM(nothing),
    SUM(no_barrier),
    SUM(store_past_end),
    SUM(shuffle_in_branch),
    SUM(barrier_in_branch),
    SUM(two_barriers),
    SUM(return_before_barrier),
    SUM(uninitialised_slot),
    SUM(same_output),
    SUM(read_only_output),
    SUM(misaligned_load),
    RELAY(nothing),
    RELAY(arrive_only),
    RELAY(late_arrive),
    RELAY(named_count),
    RELAY(half_warp),
    RELAY(no_warp_sync),
    RELAY(plain_count),
    RING(nothing),
    RING(load_before_barrier),
    RING(weak_wait),
    RING(no_wait),
    RING(no_commit),
    RING(no_loop_barrier),
    RING(no_reuse_barrier),
    RING(no_read_barrier),
    RING(source_past_end),
    RING(shifted_source),
    RING(too_many_bytes),
    RING(no_zero_fill),
    RING(wrong_selector),
    RING(swapped_nibbles),
    RING(swapped_halves),
    RING(no_swizzle),
};

void judge(const Case& c) {
  int runs = 0, reported = 0, wrong = 0;
  std::string first = "-";
  const auto one = [&](simt::Schedule schedule, simt::Landing landing, uint64_t seed) {
    simt::Run run;
    run.schedule = schedule;
    run.landing = landing;
    run.seed = seed;
    run.detector = detector;
    const bool right = c.run();
    ++runs;
    if (run.fault) {
      if (!reported++)
        first = run.fault->text == "bank conflicts" ? run.fault->text : simt::name(run.fault->kind);
    } else if (!right) {
      ++wrong;
    }
  };
  for (simt::Landing landing : {simt::Landing::early, simt::Landing::late, simt::Landing::random}) {
    one(simt::Schedule::forward, landing, 1);
    one(simt::Schedule::reverse, landing, 1);
    for (uint64_t seed = 1; seed <= 20; ++seed) one(simt::Schedule::random, landing, seed);
  }
  printf("%s %d %d %d %s\n", c.name, runs, reported, wrong, first.c_str());
}

}  // namespace

int main(int count, char** arguments) {
  std::vector<std::string> wanted;
  for (int i = 1; i < count; ++i) {
    const std::string argument = arguments[i];
    if (argument == "--no-detector")
      detector = false;
    else if (argument == "--plain-memory")
      plain_memory = true;
    else
      wanted.push_back(argument);
  }
  for (const Case& c : kCases) {
    bool mine = wanted.empty();
    for (const std::string& name : wanted) mine |= name == c.name;
    if (mine) judge(c);
  }
  return 0;
}
