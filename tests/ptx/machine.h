// SPDX-License-Identifier: Apache-2.0
// What the interpreter is made of: a Module of Kernels of Instructions (parse.cpp, decode.cpp and the tables of operations),
// and the machine that runs them: Memory of registered buffers, one Block of Warps at a time (run.cpp, memory.cpp).
#pragma once

#include <bit>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

#include "shadow.h"

namespace lissom::ptx {

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};
[[noreturn]] [[gnu::format(printf, 1, 2)]] void fault(const char* format, ...);

constexpr uint32_t kAllLanes = 0xffffffffu;
constexpr int kBarriers = 16;
// Shared memory starts here, so that a null or a wrapped address is out of bounds; generic addresses of the two private
// spaces lie in windows that no host pointer can name.
constexpr uint64_t kSharedBase = 1024, kLocalBase = 64;
constexpr uint64_t kSharedWindow = 0xff00'0000'0000'0000, kLocalWindow = 0xfe00'0000'0000'0000,
                   kWindow = 1ull << 32;

enum class Space : uint8_t { generic, global, shared, local, constant, param };

class Warp;
class Block;
struct Dim {
  uint32_t x = 1, y = 1, z = 1;
  uint64_t count() const { return uint64_t{x} * y * z; }
};

// --- program ---

struct Instruction {
  enum class Flow : uint8_t { next, branch, table, exit, collective, barrier };
  Flow flow = Flow::next;
  bool negated = false;           // guard
  int guard = -1;                 // register, -1: none
  int member = -1;                // collective: register with the member mask, -1: the whole warp
  int target = -1;                // branch: label; table: first of `targets`
  int index = -1;                 // table: register
  std::vector<int> targets;       // table: labels
  std::function<void(Warp&)> op;  // the data part, for the active lanes
  int line = 0;
  std::string_view opcode, text;
  uint64_t executed = 0;
};

struct Variable {
  std::string name;
  Space space;
  uint64_t offset, bytes, align;
};

// A register row that is filled before the first instruction: a literal, an address or a special register.
struct Constant {
  int slot;
  uint64_t value;
  int variable = -1;         // shared: base of the dynamic block is added at launch
  std::string_view special;  // e.g. "%tid.x"
};

struct Kernel {
  std::string name;
  std::vector<Variable> params;
  uint64_t param_bytes = 0, static_shared = 0, dynamic_align = 16, local_bytes = 0;
  int registers = 0;
  std::vector<Constant> constants;
  std::vector<Instruction> code;
  std::vector<int> labels;  // label id -> instruction
  Dim max_threads{0, 0, 0}, required_threads{0, 0, 0};
};

struct Module {
  std::string text;
  std::string target;
  std::map<std::string, Kernel> kernels;
  struct Global {
    std::vector<uint64_t>
        storage;  // 8-byte units, so that it is aligned; the alignment asked for may be larger
    uint8_t* data;
    uint64_t bytes;
    Space space;
  };
  std::map<std::string, Global> globals;
};
std::unique_ptr<Module> parse(std::string text);

// --- machine ---

struct Options {
  int landing = 0;    // of asynchronous copies: 0 at the issue, 1 at the wait, 2 at random between
  uint64_t seed = 0;  // order of blocks and warps: 0 forward, 1 reverse, others random; also noise and poison
  bool strict_zero_fill = true;  // the source of a copy of zero bytes must still lie in a buffer
  bool global_shadow =
      true;  // races and dependences between blocks in writable buffers; 6 KiB a touched 256 bytes
  bool approximate = true;  // .approx results deviate as far as PTX allows, by a hash of seed and operands
  uint64_t max_steps = 2'000'000'000;
};

struct Buffer {
  uint8_t* base;
  size_t bytes;
  bool writable;
  std::string name;
  std::unique_ptr<Shadow> shadow;  // of the current launch, writable ones only
};

// Global memory is host memory that was registered.
class Memory {
 public:
  void add(void* base, size_t bytes, bool writable, std::string name);
  void remove(const void* base);
  void clear() { buffers_.clear(); }
  void begin_launch(bool shadow);
  Buffer& find(uint64_t address, size_t bytes);

 private:
  std::map<uint64_t, Buffer> buffers_;  // by base
};

struct Launch {
  Kernel& kernel;
  Module& module;
  Memory& memory;
  Dim grid, threads;
  uint32_t dynamic_shared;
  std::vector<uint8_t> params;
  Options options;
};
void run(Launch& launch);
std::vector<uint8_t> pack_params(const Kernel&, void* const* args);

struct Copy {
  int thread, lane;
  size_t at;  // in shared memory
  uint32_t bytes, source_bytes;
  const uint8_t* source;
  bool landed;
};

struct Reduced {
  uint32_t count = 0;
  bool all = true, any = false;
};

struct BarrierCall {
  uint32_t id, count;  // count 0: all threads
  bool waits;
  uint32_t votes = 0, voters = 0;              // of red: lanes with a true predicate, lanes
  std::function<void(Warp&, Reduced)> result;  // of red
};

class Warp {
 public:
  struct Group {  // lanes that stand at one instruction
    int pc;
    uint32_t lanes;
  };
  Warp(Block& owner, int number);
  void reset();

  Block& block;
  const int index;
  uint32_t live = 0, active = 0;  // not exited; executing now
  int pc = 0;                     // of the instruction that executes
  std::vector<Group> groups;      // runnable, by ascending pc
  std::vector<Group> armed;       // waiting at a collective or barrier for the other lanes
  bool waiting = false;           // at a barrier, for other warps
  BarrierCall call{};
  std::vector<uint64_t> carry;  // CC.CF
  std::vector<uint8_t> local;

  int thread(int lane) const { return index * kLanes + lane; }
  uint64_t& at(int slot, int lane) { return rows_[static_cast<size_t>(slot) * kLanes + lane]; }
  template <class T>
  T get(int slot, int lane) {
    if constexpr (sizeof(T) == 8)
      return std::bit_cast<T>(at(slot, lane));
    else if constexpr (sizeof(T) == 4)
      return std::bit_cast<T>(static_cast<uint32_t>(at(slot, lane)));
    else
      return static_cast<T>(at(slot, lane));
  }
  // Registers hold their value zero-extended to 64 bits.
  template <class T>
  void put(int slot, int lane, T v) {
    if constexpr (sizeof(T) == 8)
      at(slot, lane) = std::bit_cast<uint64_t>(v);
    else if constexpr (sizeof(T) == 4)
      at(slot, lane) = std::bit_cast<uint32_t>(v);
    else
      at(slot, lane) = static_cast<std::make_unsigned_t<T>>(v);
  }
  template <class F>
  void each(F f) {
    for (int lane = 0; lane < kLanes; ++lane)
      if (active >> lane & 1) f(lane);
  }
  void join(int pc, uint32_t lanes);
  bool runnable() const { return live && !waiting && !groups.empty(); }

 private:
  std::vector<uint64_t> rows_;
};

class Block {
 public:
  explicit Block(Launch&);
  void run(Dim index, uint32_t number);
  std::string where() const;
  Launch& launch;
  std::mt19937_64 random;

  // Checked accesses of one lane; the pointer of read and atomic is valid until the next instruction.
  const uint8_t* read(Warp&, int lane, Space, uint64_t address, uint32_t bytes, bool read_only = false);
  void write(Warp&, int lane, Space, uint64_t address, const void* data, uint32_t bytes);
  uint8_t* atomic(Warp&, int lane, Space, uint64_t address, uint32_t bytes);

  void issue_copy(Warp&, int lane, uint64_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes);
  void commit_copies(Warp&, int lane);
  void wait_copies(Warp&, int lane, size_t unfinished);
  void wait_all_copies(Warp&, int lane);

  void syncwarp(Warp&, uint32_t lanes);
  void barrier(Warp&, BarrierCall);

 private:
  struct Barrier {
    uint32_t count = 0, warps = 0, waiting = 0;  // threads asked for; warps that arrived, and that wait
    int pc = -1;
    Reduced reduced;
    Clocks::Vector sum;
  };
  struct Copies {
    std::vector<Copy> open;
    std::deque<std::vector<Copy>> groups;
  };
  struct Place {
    uint8_t* data;
    Shadow* shadow;
    size_t at;
    Buffer* buffer;
  };
  void fill(Warp&);
  uint64_t special(std::string_view name, const Warp&, int lane) const;
  void step(Warp&);
  void gather(Warp&, int pc, uint32_t active);
  void fire(Warp&, int pc, uint32_t lanes);
  void leave(Warp&, uint32_t lanes);
  void complete(uint32_t barrier);
  Warp* choose();
  [[noreturn]] void report_deadlock();
  Place place(Warp&, int lane, Space, uint64_t address, uint32_t bytes, const char* verb);
  Access access(const Warp&, int lane, bool atomic = false) const;
  void land(Copy&);
  void finish(Warp&, std::vector<Copy>&);
  void maybe_land(Copies&);

  Kernel& kernel_;
  uint32_t number_ = 0;  // 1, 2, ...
  Dim index_;
  std::vector<std::unique_ptr<Warp>> warps_;
  std::vector<uint8_t> shared_;
  std::unique_ptr<Shadow> shadow_;
  Clocks clocks_;
  std::vector<Copies> copies_;
  Barrier barriers_[kBarriers];
  std::vector<uint64_t> priority_;
  uint64_t steps_ = 0, slice_ = 0;
  Warp* current_ = nullptr;
};

}  // namespace lissom::ptx
