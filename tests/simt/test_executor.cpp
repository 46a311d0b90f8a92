// SPDX-License-Identifier: Apache-2.0
// Schedules, launches, texts of reports, counters. Prints the first failure and returns 1, else the counters of one run as JSON.
#include <stdio.h>

#include <set>
#include <vector>

#include "../cpp/require.h"
#include "kernels.cuh"
#include "simt.h"

using namespace lissom;
using dev::Grid;
using dev::shared;
using plants::Plant;
using simt::Schedule;
using simt::Space;

namespace {

// In which order 3 warps of 4 blocks reach a line, as positions; 8 lanes of each warp note theirs.
std::vector<int> order_of(Schedule schedule, uint64_t seed) {
  simt::Buffer<int> next(1), order(4 * 96);
  simt::Run run;
  run.schedule = schedule;
  run.seed = seed;
  const auto kernel = +[](int* counter, int* to) {
    dev::store(to + 96 * dev::block_x() + dev::thread(), dev::atomic_add(counter, 1));
  };
  if (dev::launch(kernel, Grid{4}, 96, 0, nullptr, next.data(), order.data()) != 0) return {};
  return {order.begin(), order.end()};
}

bool schedules_differ_and_repeat() {
  const std::vector<int> forward = order_of(Schedule::forward, 1), reverse = order_of(Schedule::reverse, 1);
  for (int i = 0; i < 384; ++i) REQUIRE(forward[i] == i && reverse[i] == 383 - i);
  std::set<std::vector<int>> seen;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    seen.insert(order_of(Schedule::random, seed));
    REQUIRE(order_of(Schedule::random, seed) == order_of(Schedule::random, seed));
  }
  REQUIRE(seen.size() == 20 && !seen.count(forward) && !seen.count(reverse));
  std::set<bool> first_block_first;
  for (const std::vector<int>& order : seen) first_block_first.insert(order[0] < 96);
  REQUIRE(first_block_first.size() == 2);
  return true;
}

// Load, add, store without an atomic: right as long as nobody is interrupted between them.
bool random_schedules_interrupt() {
  int lost = 0;
  for (uint64_t seed = 0; seed <= 20; ++seed) {
    simt::Buffer<uint32_t> out(1);
    simt::Run run;
    run.schedule = seed == 0 ? Schedule::forward : Schedule::random;
    run.seed = seed;
    run.detector = false;
    const auto kernel = +[](uint32_t* to) {
      const auto count = shared<uint32_t>(0);
      if (dev::thread() == 0) count.store(0, 0);
      dev::barrier();
      for (int i = 0; i < 10; ++i) count.store(0, count.load() + 1);
      dev::barrier();
      if (dev::thread() == 0) dev::store(to, count.load());
    };
    REQUIRE(dev::launch(kernel, Grid{}, 128, 4, nullptr, out.data()) == 0);
    if (seed == 0) REQUIRE(out[0] == 1280);
    lost += out[0] < 1280;
  }
  REQUIRE(lost >= 5);
  return true;
}

bool launches_are_checked() {
  const auto nothing = +[](int) {};
  simt::Run run;
  REQUIRE(dev::launch(nothing, Grid{0}, 32, 0, nullptr, 1) == simt::kInvalidConfiguration);
  REQUIRE(dev::launch(nothing, Grid{1, 65536}, 32, 0, nullptr, 1) == simt::kInvalidConfiguration);
  REQUIRE(dev::launch(nothing, Grid{1, 1, 65536}, 32, 0, nullptr, 1) == simt::kInvalidConfiguration);
  REQUIRE(dev::launch(nothing, Grid{int64_t{1} << 31}, 32, 0, nullptr, 1) == simt::kInvalidConfiguration);
  REQUIRE(dev::launch(nothing, Grid{}, 1056, 0, nullptr, 1) == simt::kInvalidConfiguration);
  REQUIRE(dev::launch(nothing, Grid{}, 0, 0, nullptr, 1) == simt::kInvalidConfiguration);
  REQUIRE(dev::launch(nothing, Grid{}, 32, 163 * 1024 + 1, nullptr, 1) == simt::kInvalidValue && !run.fault);
  REQUIRE(dev::launch(nothing, Grid{2, 3, 2}, 1024, 163 * 1024, nullptr, 1) == 0);
  REQUIRE(dev::launch(nothing, Grid{}, 48, 0, nullptr, 1) == simt::kLaunchFailure);
  REQUIRE(run.fault->kind == simt::Kind::launch);
  REQUIRE(dev::launch(nothing, Grid{}, 32, 0, nullptr, 1) == simt::kLaunchFailure);  // a fault stays
  simt::Run other;
  REQUIRE(dev::launch(nothing, Grid{}, 32, 0, nullptr, 1) == 0 && simt::Run::current() == &other);
  return true;
}

bool indices_are_right() {
  simt::Buffer<int> seen(2 * 3 * 4 * 64);
  simt::Run run;
  const auto kernel = +[](int* to) {
    const int block = (dev::block_z() * dev::grid_y() + dev::block_y()) * dev::grid_x() + dev::block_x();
    dev::store(to + block * dev::threads() + 32 * dev::warp() + dev::lane(),
               block * 64 + dev::thread() + dev::grid_z());
  };
  REQUIRE(dev::launch(kernel, Grid{2, 3, 4}, 64, 0, nullptr, seen.data()) == 0);
  for (int i = 0; i < 24 * 64; ++i) REQUIRE(seen[i] == i + 4);
  return true;
}

bool contains(const std::string& text, const std::vector<std::string>& parts) {
  for (const std::string& part : parts)
    if (text.find(part) == std::string::npos) {
      fprintf(stderr, "no \"%s\" in:\n%s\n", part.c_str(), text.c_str());
      return false;
    }
  return true;
}

bool reports_say_where() {
  simt::Buffer<float> x(100), y(2);
  simt::Run run;
  dev::launch(plants::sum<Plant::return_before_barrier>, Grid{2}, 128, 16, nullptr, x.data(), y.data(), 100);
  REQUIRE(run.fault &&
          contains(run.fault->text, {"divergence: lanes of one warp", "threads 100-127 have returned",
                                     "threads 0-95 wait in barrier at", "kernels.cuh:", "block (0, 0, 0)",
                                     "threads 96-99 wait in shuffle_xor at", "do: "}));
  simt::Run race;
  race.schedule = Schedule::reverse;
  const auto kernel = +[](float* to) {
    if (dev::warp() == 1) shared<float>(0).store(dev::lane(), 1);
    if (dev::warp() == 0) shared<float>(0).store(dev::lane(), 2), dev::store(to, 1.0f);
  };
  dev::launch(kernel, Grid{1, 2}, 64, 128, nullptr, y.data());
  const std::string line = std::to_string(race.fault->line), before = std::to_string(race.fault->line - 1);
  REQUIRE(contains(race.fault->text,
                   {"race: store of 4 bytes, shared byte 124", "store of thread 63 (warp 1 lane 31)",
                    "test_executor.cpp:" + line, "test_executor.cpp:" + before, "block (0, 1, 0)",
                    "thread 31 (warp 0 lane 31)", "do: put a barrier"}));
  return true;
}

bool requests_are_counted() {
  uint64_t at[32];
  unsigned ideal = 0;
  const auto with = [&](int stride) {
    for (int l = 0; l < 32; ++l) at[l] = l * stride;
    return at;
  };
  REQUIRE(simt::wavefronts(with(4), ~0u, 4, &ideal) == 1 && ideal == 1);
  REQUIRE(simt::wavefronts(with(0), ~0u, 4, &ideal) == 1 && ideal == 1);     // one word for all
  REQUIRE(simt::wavefronts(with(2), ~0u, 2, &ideal) == 1 && ideal == 1);     // two lanes a word
  REQUIRE(simt::wavefronts(with(8), ~0u, 4, &ideal) == 2 && ideal == 1);     // every second bank
  REQUIRE(simt::wavefronts(with(128), ~0u, 4, &ideal) == 32 && ideal == 1);  // one bank
  REQUIRE(simt::wavefronts(with(132), ~0u, 4, &ideal) == 1 && ideal == 1);   // padded by one word
  REQUIRE(simt::wavefronts(with(8), ~0u, 8, &ideal) == 2 && ideal == 2);
  REQUIRE(simt::wavefronts(with(16), ~0u, 16, &ideal) == 4 && ideal == 4);
  REQUIRE(simt::wavefronts(with(64), ~0u, 16, &ideal) == 16 && ideal == 4);  // rows of 64 bytes: 4 a phase
  REQUIRE(simt::wavefronts(with(64), 0xffu, 16, &ideal) == 4 && ideal == 1);
  for (int l = 0; l < 32; ++l) at[l] = l * 64 + (l >> 1 & 3) * 16;  // ... and 1 with the swizzle
  REQUIRE(simt::wavefronts(at, ~0u, 16, &ideal) == 4 && ideal == 4);
  REQUIRE(simt::sectors(with(4), ~0u, 4, &ideal) == 4 && ideal == 4);
  REQUIRE(simt::sectors(with(0), ~0u, 4, &ideal) == 1 && ideal == 1);
  REQUIRE(simt::sectors(with(32), ~0u, 4, &ideal) == 32 && ideal == 4);
  REQUIRE(simt::sectors(with(16), 0xffu, 16, &ideal) == 4 && ideal == 4);
  for (uint64_t* p = with(4); p < at + 32; ++p) *p += 20;
  REQUIRE(simt::sectors(at, ~0u, 4, &ideal) == 5 && ideal == 4);  // shifted
  return true;
}

// Lanes that run apart are put together again, also where one of them left out a request.
bool lanes_meet_in_requests() {
  for (Schedule schedule : {Schedule::forward, Schedule::reverse, Schedule::random}) {
    simt::Buffer<float> x(64 * 8), y(64);
    simt::Run run;
    run.schedule = schedule;
    const auto kernel = +[](const float* from, float* to) {
      float sum = 0;
      for (int i = 0; i < 8; ++i) {
        if (i != 3 || dev::lane() % 2) sum += dev::load(from + 64 * i + dev::thread());
        dev::warp_sync();
      }
      dev::store(to + dev::thread(), sum);
      dev::cp_async<4>(shared<float>(4 * dev::thread()), from, dev::lane() < 8 ? 4 : 0);
    };
    REQUIRE(dev::launch(kernel, Grid{}, 64, 256, nullptr, x.data(), y.data()) == 0);
    const simt::Counters& c = run.kernels.begin()->second;
    const simt::Traffic loads = c.total(Space::global, "load"), stores = c.total(Space::global, "store");
    REQUIRE(loads.requests == 16 && loads.units == 64 && loads.ideal == 60 &&
            loads.bytes == 4 * (14 * 32 + 32));
    REQUIRE(stores.requests == 2 && stores.units == 8 && stores.ideal == 8);
    const simt::Traffic reads = c.total(Space::global, "cp_async"),
                        writes = c.total(Space::shared, "cp_async");
    REQUIRE(reads.requests == 2 && reads.units == 2 && reads.bytes == 64);
    REQUIRE(writes.requests == 2 && writes.units == 2 && writes.bytes == 256);
    REQUIRE(c.read_footprint == 64 * 8 * 4 && c.write_footprint == 64 * 4);
  }
  return true;
}

// The ring of kernels.cuh by hand: 6 blocks, 2 warps, 4 steps, per step 2 products, 3 ldmatrix, one word of metadata.
bool a_kernel_is_counted(std::string* json) {
  using T = dev::bf16;
  const int tokens = 96, k = 128;
  simt::Buffer<T> values(32 * k / 2), x(tokens * k);
  simt::Buffer<uint32_t> meta(k, 0xeeeeeeeeu);
  simt::Buffer<float> y(tokens * 32);
  simt::Run run;
  const auto kernel = plants::ring<Plant::nothing, T>;
  for (int i = 0; i < 2; ++i)
    REQUIRE(dev::launch(kernel, Grid{6}, 64, plants::kRingBytes, nullptr, values.data(), meta.data(),
                        x.data(), y.data(), tokens, k) == 0);
  const simt::Counters& c = run.counters("ring");
  REQUIRE(c.launches == 2 && c.blocks == 12 && c.threads == 768 && c.shared_bytes == plants::kRingBytes);
  REQUIRE(c.matrix.size() == 1 && c.matrix.at("mma_sp_m16n8k32") == 12 * 2 * 4 * 2);
  const simt::Traffic fragments = c.total(Space::shared, "ldmatrix"),
                      copies = c.total(Space::global, "cp_async");
  REQUIRE(fragments.requests == 12 * 2 * 4 * 3 && fragments.units == 4 * fragments.requests);
  REQUIRE(fragments.ideal == fragments.units && fragments.bytes == 512 * fragments.requests);
  REQUIRE(copies.requests == 12 * 2 * 4 * 2 && copies.bytes == 12 * 4 * 64 * 32 &&
          copies.units == copies.bytes / 32);
  REQUIRE(c.read_footprint == 2 * (values.size() * 2 + x.size() * 2 + meta.size() * 4));
  REQUIRE(c.write_footprint == 2 * y.size() * 4 &&
          c.total(Space::global, "store").bytes == c.write_footprint);
  *json = run.json();
  return true;
}

}  // namespace

int main() {
  std::string json;
  const bool right = schedules_differ_and_repeat() && random_schedules_interrupt() &&
                     launches_are_checked() && indices_are_right() && reports_say_where() &&
                     requests_are_counted() && lanes_meet_in_requests() && a_kernel_is_counted(&json);
  if (right) puts(json.c_str());
  return right ? 0 : 1;
}
