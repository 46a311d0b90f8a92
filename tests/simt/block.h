// SPDX-License-Identifier: Apache-2.0
// One block while it runs. Inside of the executor only.
#pragma once

#include <bitset>
#include <deque>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <unordered_map>
#include <vector>

#include "counters.h"
#include "executor.h"
#include "fiber.h"
#include "race.h"

namespace simt {

constexpr int kMaxThreads = 1024;
constexpr uint64_t kPage = 1024;  // bytes of global memory whose history is kept together

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
  const char* waits_in = nullptr;
  Site waits_at;
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
  uint32_t block = 0;
  Access by;
  bool several = false;  // `by` is the newest of atomics that nothing orders among themselves,
  uint32_t phase = 0;    // and a plain access must be behind a block barrier since
};

enum class Use { read, read_only, write, atomic };

struct Launch {
  std::string kernel;
  Run& run;
  Meter meter;
  std::mt19937_64 random;
  std::unordered_map<uint64_t, std::vector<Written>> written = {};  // cells of two bytes, by page
  std::unordered_map<uint64_t, std::bitset<kPage>> read_only = {};  // bytes that the read-only path loaded
};

class Block {
 public:
  Block(Launch& launch, const Index& index, uint32_t number, int shared_bytes);
  void run(const std::function<void()>& body);

  // Called by the thread that runs.
  void pause(const char* operation, Site at);  // until wake
  void interrupt();                            // random schedule: now and then another warp goes on
  void wake(int thread);
  Barrier& barrier(int id) { return barriers_[id]; }
  Warp& warp() { return warps_[now.thread / 32]; }
  Thread& thread() { return threads_[now.thread]; }

  Access access(uint16_t place) const;
  void check(const Shadow::Found& found, int bytes, uint16_t place);
  void inside(uint32_t offset, int bytes, Site at, const char* operation);
  void land(Copy& copy);
  void check_global_order(const void* p, int bytes, uint16_t place, Use use);

  Index now;  // of the thread that runs
  Launch& launch;
  const uint32_t block_number;
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
