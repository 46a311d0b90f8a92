// SPDX-License-Identifier: Apache-2.0
// One block while it runs. Inside of the executor only.
#pragma once

#include <bitset>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "counters.h"
#include "executor.h"
#include "fiber.h"
#include "race.h"

namespace simt {

constexpr int kMaxThreads = 1024;

struct Copy {
  uint32_t dst;
  const unsigned char* src;
  int bytes, src_bytes, thread;
  uint16_t place;
  bool landed;
};

struct Thread {
  enum class State { ready, waiting, done };
  State state = State::ready;
  std::string waits_for;  // while it waits
  std::vector<Copy*> open;
  std::deque<std::vector<Copy*>> groups;
};

struct Barrier {
  int count = 0;  // 0: nobody is there
  int arrived = 0;
  Site at;
  std::bitset<kMaxThreads> here, waiting;
  Clocks::Joint joint;
};

struct Warp {
  uint32_t ready = 0, arrived = 0;
  const char* operation = nullptr;
  Site at;
  void* operands[32] = {};
  uint32_t priority = 0;
  bool reverse = false;
};

// Who wrote a byte of global memory in this launch. Blocks run one after the other, so what two of them do to one byte is found
// here and not by chance.
struct Written {
  uint32_t block = ~0u;
  Access by;
};

struct Launch {
  std::string kernel;
  Run& run;
  Meter meter;
  std::mt19937_64 random;
  std::map<uint64_t, std::vector<Written>> written;  // pages of 1 KiB, a cell is two bytes
};

class Block {
 public:
  Block(Launch& launch, const Index& index, uint32_t number, int shared_bytes);
  void run(const std::function<void()>& body);

  // Called by the thread that runs.
  void pause(std::string waits_for);  // until wake
  void interrupt();                   // random schedule: now and then another warp goes on
  void wake(int thread);
  Barrier& barrier(int id) { return barriers_[id]; }
  Warp& warp() { return warps_[now.thread / 32]; }
  Thread& thread() { return threads_[now.thread]; }

  Access access(uint16_t place) const;
  void check(const Shadow::Found& found, int bytes, uint16_t place);
  void inside(uint32_t offset, int bytes, Site at, const char* operation);
  void land(Copy& copy);
  void check_written(const void* p, int bytes, uint16_t place, bool write, bool atomic, bool read_only);

  Index now;  // of the thread that runs
  Launch& launch;
  const uint32_t number_of_block;
  Clocks clocks;
  Shadow shadow;
  std::vector<unsigned char> shared;
  std::deque<Copy> copies;
  std::multimap<uint64_t, Copy*> landings;  // random landing: at which step
  uint64_t step = 0;

 private:
  static void entry();
  int pick();
  void report_deadlock();

  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  Barrier barriers_[16];
  std::vector<int> order_;  // of warps, first goes first
  uint64_t interrupt_at_ = 0, accesses_ = 0;
  int live_ = 0;
  const std::function<void()>* body_ = nullptr;
};

Block& block();  // that runs
std::string where(const Block& b, int thread);

}  // namespace simt
