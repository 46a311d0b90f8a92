// SPDX-License-Identifier: Apache-2.0
// Every report of the executor made to fire, and right programs close by that stay silent, under all schedules and landings.
// Prints the first failure and returns 1.
#include <stdio.h>

#include "core/cuda/dev.cuh"
#include "simt.h"

using namespace lissom;
using dev::shared;
using simt::Kind;

namespace {

// A kernel, mostly of 64 threads, with 1 KiB of shared memory; float[64] and uint32_t[64] in global memory.
struct Case {
  const char* name;
  std::optional<Kind> kind;  // none: must stay silent
  void (*kernel)(float*, uint32_t*);
  int threads = 64;
};
const dev::Shared<uint8_t> bytes = shared<uint8_t>(0);
const dev::Shared<uint32_t> words = shared<uint32_t>(0);

void fill() {
  words.store(dev::thread(), 1);
  dev::barrier();
}
void copy_word(const float* p) { dev::cp_async<4>(words + dev::thread(), p + dev::thread()); }

const Case kCases[] = {
    // shared memory: bounds, alignment, values never written
    {"shared load past the end", Kind::bounds, [](float*, uint32_t*) { shared<float>(1024).load(); }},
    {"shared load in front", Kind::bounds, [](float*, uint32_t*) { (shared<float>(0) + -1).load(); }},
    {"shared vector over the end", Kind::bounds,
     [](float*, uint32_t*) { shared<dev::Vec<float, 4>>(1008).store(1, {}); }},
    {"shared vector misaligned", Kind::misaligned,
     [](float*, uint32_t*) { shared<dev::Vec<float, 4>>(8).store(0, {}); }},
    {"shared never written", Kind::uninitialised, [](float*, uint32_t*) { words.load(dev::thread()); }},
    {"shared half written", Kind::uninitialised,
     [](float*, uint32_t*) {
       shared<uint8_t>(4 * dev::thread()).store(0, 1);
       shared<uint16_t>(4 * dev::thread()).load();
     }},
    // races
    {"write, read", Kind::race,
     [](float*, uint32_t*) {
       fill();
       if (dev::thread() == 0) words.store(0, 2);
       if (dev::thread() == 63) words.load(0);
     }},
    {"write, read of another warp behind warp_sync", Kind::race,
     [](float*, uint32_t*) {
       fill();
       words.store(dev::thread(), 2);
       dev::warp_sync();
       words.load(dev::thread() ^ 32);
     }},
    {"write, read behind a shuffle, which orders nothing", Kind::race,
     [](float*, uint32_t*) {
       words.store(dev::thread(), 1);
       dev::shuffle(1, 0);
       words.load(dev::thread() ^ 1);
     }},
    {"write, read behind a barrier", std::nullopt,
     [](float*, uint32_t*) {
       fill();
       words.load(63 - dev::thread());
     }},
    {"write, read behind warp_sync", std::nullopt,
     [](float*, uint32_t*) {
       words.store(dev::thread(), 1);
       dev::warp_sync();
       words.load(dev::thread() ^ 1);
     }},
    {"read, write", Kind::race,
     [](float*, uint32_t*) {
       fill();
       words.load(63 - dev::thread());
       words.store(dev::thread(), 2);
     }},
    {"read by all often, then write behind a barrier", std::nullopt,
     [](float*, uint32_t*) {
       fill();
       for (int i = 0; i < 30; ++i) words.load(0), dev::warp_sync();
       dev::barrier();
       if (dev::thread() == 5) words.store(0, 1);
     }},
    {"read by all often, then write", Kind::race,
     [](float*, uint32_t*) {
       fill();
       for (int i = 0; i < 30; ++i) words.load(0), dev::warp_sync();
       if (dev::warp() == 1) return;
       dev::warp_sync();
       if (dev::thread() == 5) words.store(0, 1);
     }},
    {"two writes", Kind::race, [](float*, uint32_t*) { words.store(dev::thread() / 2, 1); }},
    {"two writes to halves of a cell", std::nullopt,
     [](float*, uint32_t*) { bytes.store(dev::thread(), 1); }},
    {"ordered through a third warp", std::nullopt,
     [](float*, uint32_t*) {
       if (dev::thread() == 0) words.store(0, 1);
       if (dev::warp() == 0) dev::barrier_arrive(1, 64);
       if (dev::warp() == 1) dev::barrier_sync(1, 64), dev::barrier_arrive(2, 64);
       if (dev::warp() == 2) dev::barrier_sync(2, 64), words.load(0);
     },
     96},
    {"a third warp, not ordered", Kind::race,
     [](float*, uint32_t*) {
       fill();
       if (dev::thread() == 0) words.store(0, 1);
       if (dev::warp() == 0) dev::barrier_sync(1, 64);
       if (dev::warp() == 1) dev::barrier_arrive(1, 64), dev::barrier_arrive(2, 64);
       if (dev::warp() == 2) dev::barrier_sync(2, 64), words.load(0);
     },
     96},
    {"arriving is not waiting", Kind::race,
     [](float*, uint32_t*) {
       if (dev::warp() == 1) words.store(dev::lane(), 1), dev::barrier_sync(1, 64);
       if (dev::warp() == 0) dev::barrier_arrive(1, 64), dev::warp_sync(), words.store(dev::lane(), 1);
     }},
    {"reads before and behind a barrier, then a write that is behind the first", Kind::race,
     [](float*, uint32_t*) {
       fill();
       if (dev::warp() == 0) dev::barrier_sync(1, 64);
       if (dev::thread() == 0) words.load(0), words.store(0, 1);
       if (dev::warp() == 0) return;
       words.load(0);
       dev::barrier_arrive(1, 64);
       for (int i = 0; i < 7; ++i) words.load(0), dev::warp_sync();  // 256 reads: the next makes room
     }},
    {"atomics among themselves", std::nullopt,
     [](float*, uint32_t* u) {
       fill();
       dev::atomic_add(words, 1u);
       dev::atomic_max(words, 1u);
       dev::atomic_add(u, 1u);
       dev::barrier();
       words.load(0);
       dev::load_plain(u);
     }},
    {"an atomic, then a plain read", Kind::race,
     [](float*, uint32_t*) {
       fill();
       if (dev::lane() == 0) dev::atomic_add(words + dev::warp(), 1u);
       dev::shuffle(1, 0);  // comes later, but nothing orders it
       if (dev::lane() == 1) words.load(dev::warp());
     }},
    {"a plain read, then an atomic", Kind::race,
     [](float*, uint32_t*) {
       fill();
       if (dev::lane() == 0) words.load(dev::warp());
       dev::shuffle(1, 0);
       if (dev::lane() == 1) dev::atomic_cas(words + dev::warp(), 0u, 1u);
     }},
    {"a byte read, its neighbour written, then itself", Kind::race,
     [](float*, uint32_t*) {
       fill();
       if (dev::thread() == 0) bytes.load(0);
       dev::shuffle(1, 0);
       if (dev::thread() == 1) bytes.store(1, 1);
       dev::shuffle(1, 0);
       if (dev::thread() == 2) bytes.store(0, 1);
     }},
    {"ldmatrix of rows that each lane just stored", Kind::race,
     [](float*, uint32_t*) {
       const auto row = shared<dev::Vec<uint32_t, 4>>(16 * dev::lane());
       if (dev::warp() == 1) return;
       row.store(0, {});
       uint32_t r[4];
       dev::ldmatrix<4>(r, row);
     }},
    {"the same behind warp_sync", std::nullopt,
     [](float*, uint32_t*) {
       const auto row = shared<dev::Vec<uint32_t, 4>>(16 * dev::lane());
       if (dev::warp() == 1) return;
       row.store(0, {});
       dev::warp_sync();
       uint32_t r[4];
       dev::ldmatrix<4>(r, row);
     }},
    {"ldmatrix, then a store by another warp", Kind::race,
     [](float*, uint32_t*) {
       const auto row = shared<dev::Vec<uint32_t, 4>>(16 * dev::lane());
       if (dev::warp() == 0) row.store(0, {});
       dev::barrier();
       uint32_t r[4];
       if (dev::warp() == 0) dev::ldmatrix<4>(r, row);
       if (dev::warp() == 1) row.store(0, {});
     }},
    // global memory
    {"global past the end", Kind::bounds, [](float* p, uint32_t*) { dev::load(p + 1 + dev::thread()); }},
    {"global in front", Kind::bounds, [](float* p, uint32_t*) { dev::load(p - 1); }},
    {"global misaligned", Kind::misaligned,
     [](float* p, uint32_t*) { dev::load(reinterpret_cast<const dev::Vec<float, 2>*>(p + 1)); }},
    {"global, two writes", Kind::race, [](float* p, uint32_t*) { dev::store(p + dev::thread() / 2, 1.0f); }},
    {"global, write and read", Kind::race,
     [](float* p, uint32_t*) {
       dev::store(p + dev::thread(), 1.0f);
       dev::load_plain(p + (dev::thread() ^ 1));
     }},
    {"global, write and read behind a barrier", std::nullopt,
     [](float* p, uint32_t*) {
       dev::store(p + dev::thread(), 1.0f);
       dev::barrier();
       dev::load_plain(p + (dev::thread() ^ 33));
     }},
    {"global, atomic and write", Kind::race,
     [](float* p, uint32_t*) {
       dev::atomic_add(p, 1.0f);
       if (dev::thread() == 63) dev::store(p, 1.0f);
     }},
    {"read-only load of what was written", Kind::read_only,
     [](float* p, uint32_t*) {
       dev::store(p + dev::thread(), 1.0f);
       dev::barrier();
       dev::load(p + dev::thread());
     }},
    {"write to what was loaded read-only", Kind::read_only,
     [](float* p, uint32_t*) { dev::store(p + dev::thread(), dev::load_stream(p + dev::thread())); }},
    {"write in place by the plain path", std::nullopt,
     [](float* p, uint32_t*) { dev::store(p + dev::thread(), dev::load_plain(p + dev::thread()) + 1); }},
    // asynchronous copies
    {"copy, touch by its own thread", Kind::in_flight,
     [](float* p, uint32_t*) {
       copy_word(p);
       dev::cp_async_commit();
       words.load(dev::thread());
     }},
    {"copy, store into it", Kind::in_flight,
     [](float* p, uint32_t*) {
       copy_word(p);
       words.store(dev::thread(), 1);
     }},
    {"two copies to one place", Kind::in_flight,
     [](float* p, uint32_t*) {
       copy_word(p);
       copy_word(p);
     }},
    {"copy not committed before the wait", Kind::in_flight,
     [](float* p, uint32_t*) {
       copy_word(p);
       dev::cp_async_wait<0>();
       words.load(dev::thread());
     }},
    {"copy, wait, own thread", std::nullopt,
     [](float* p, uint32_t*) {
       copy_word(p);
       dev::cp_async_commit();
       dev::cp_async_wait<0>();
       words.load(dev::thread());
     }},
    {"copy, wait, other thread", Kind::race,
     [](float* p, uint32_t*) {
       copy_word(p);
       dev::cp_async_commit();
       dev::cp_async_wait<0>();
       dev::shuffle(1, 0);  // all have waited, but nothing orders them
       words.load(dev::thread() ^ 1);
     }},
    {"copy, barrier, wait, other thread", Kind::race,
     [](float* p, uint32_t*) {
       copy_word(p);
       dev::cp_async_commit();
       dev::barrier();
       dev::cp_async_wait<0>();
       dev::shuffle(1, 0);
       words.load(dev::thread() ^ 1);
     }},
    {"wait<1> with an empty newest group", std::nullopt,
     [](float* p, uint32_t*) {
       copy_word(p);
       dev::cp_async_commit();
       dev::cp_async_commit();
       dev::cp_async_wait<1>();
       dev::barrier();
       words.load(63 - dev::thread());
     }},
    {"wait<1> with the wanted group the newest", Kind::in_flight,
     [](float* p, uint32_t*) {
       dev::cp_async_commit();
       copy_word(p);
       dev::cp_async_commit();
       dev::cp_async_wait<1>();
       words.load(dev::thread());
     }},
    {"copy over what others still read", Kind::race,
     [](float* p, uint32_t*) {
       fill();
       words.load(dev::thread() ^ 1);
       dev::shuffle(1, 0);  // all have read, but nothing orders it
       copy_word(p);
     }},
    {"copy of more bytes than its size", Kind::operand,
     [](float* p, uint32_t*) { dev::cp_async<8>(words + 2 * dev::thread(), p, 12); }},
    {"copy of negative bytes", Kind::operand,
     [](float* p, uint32_t*) { dev::cp_async<4>(words + dev::thread(), p, -4); }},
    {"copy to a misaligned place", Kind::misaligned,
     [](float* p, uint32_t*) { dev::cp_async<16>(words + 1 + 4 * dev::thread(), p); }},
    {"copy from a misaligned place", Kind::misaligned,
     [](float* p, uint32_t*) { dev::cp_async<8>(words + 2 * dev::thread(), p + 1); }},
    {"copy of zero bytes from nowhere", Kind::bounds,
     [](float* p, uint32_t*) { dev::cp_async<4>(words + dev::thread(), p + 100, 0); }},
    // collectives and barriers
    {"two operations in one warp", Kind::divergence,
     [](float*, uint32_t*) {
       if (dev::lane() & 1)
         dev::any(true);
       else
         dev::all(true);
     }},
    {"two operations at one line", Kind::divergence,
     [](float*, uint32_t*) { dev::lane() & 1 ? dev::any(true) : dev::all(true); }},
    {"one operation at two lines", Kind::divergence,
     [](float*, uint32_t*) {
       if (dev::lane() & 1)
         dev::any(true);
       else
         dev::any(true);
     }},
    {"a lane has returned", Kind::divergence,
     [](float*, uint32_t*) {
       if (dev::lane() == 7) return;
       dev::ballot(true);
     }},
    {"block barriers at two lines", Kind::divergence,
     [](float*, uint32_t*) {
       if (dev::warp())
         dev::barrier();
       else
         dev::barrier();
     }},
    {"block barrier without one warp", Kind::deadlock,
     [](float*, uint32_t*) {
       if (dev::warp()) dev::barrier();
     }},
    {"half warps at a named barrier", Kind::divergence,
     [](float*, uint32_t*) {
       if (dev::lane() < 16) dev::barrier_sync(1, 32);
     }},
    {"barrier 0 by number", Kind::operand, [](float*, uint32_t*) { dev::barrier_sync(0, 64); }},
    {"barrier 16", Kind::operand, [](float*, uint32_t*) { dev::barrier_arrive(16, 64); }},
    {"barrier of part of a warp", Kind::operand, [](float*, uint32_t*) { dev::barrier_sync(1, 48); }},
    {"barrier of more threads than there are", Kind::operand,
     [](float*, uint32_t*) { dev::barrier_sync(1, 96); }},
    {"two counts at one barrier", Kind::operand,
     [](float*, uint32_t*) { dev::barrier_sync(1, dev::lane() < 16 ? 64 : 32); }},
    {"arriving twice", Kind::operand,
     [](float*, uint32_t*) {
       if (dev::warp() == 0) dev::barrier_arrive(1, 64), dev::barrier_arrive(1, 64);
     }},
    {"shuffle with width 12", Kind::operand, [](float*, uint32_t*) { dev::shuffle(1, 0, 12); }},
    {"shuffle with two widths", Kind::operand,
     [](float*, uint32_t*) { dev::shuffle(1, 0, dev::lane() ? 32 : 16); }},
    {"shuffle down by 32", Kind::operand, [](float*, uint32_t*) { dev::shuffle_down(1, 32); }},
    {"copies left alone at the end", std::nullopt, [](float* p, uint32_t*) { copy_word(p); }},
};

bool as_expected(const Case& c, simt::Schedule schedule, simt::Landing landing, uint64_t seed) {
  simt::Buffer<float> p(64, 1);
  simt::Buffer<uint32_t> u(64);
  simt::Run run;
  run.schedule = schedule;
  run.landing = landing;
  run.seed = seed;
  const int error = dev::launch(c.kernel, dev::Grid{}, c.threads, 1024, nullptr, p.data(), u.data());
  const bool right = run.fault ? c.kind && run.fault->kind == *c.kind : !c.kind;
  if (right && error == (c.kind ? simt::kLaunchFailure : 0)) return true;
  fprintf(stderr, "%s (schedule %d, seed %d): %s\n", c.name, static_cast<int>(schedule),
          static_cast<int>(seed), run.fault ? run.fault->text.c_str() : "silent");
  return false;
}

}  // namespace

int main() {
  int count = 0, right = 0;
  for (const Case& c : kCases) {
    bool good = true;
    for (simt::Landing landing : {simt::Landing::early, simt::Landing::late, simt::Landing::random}) {
      good = good && as_expected(c, simt::Schedule::forward, landing, 1);
      good = good && as_expected(c, simt::Schedule::reverse, landing, 1);
      for (uint64_t seed = 1; seed <= 10; ++seed)
        good = good && as_expected(c, simt::Schedule::random, landing, seed);
    }
    ++count;
    right += good;
  }
  printf("reports: %d of %d\n", right, count);
  return right != count;
}
