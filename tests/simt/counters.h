// SPDX-License-Identifier: Apache-2.0
// What the warps asked of memory, per place in the source: requests, shared-memory wavefronts, 32-byte sectors of global memory.
// Lanes run apart here, so their accesses are put together again: the n-th of each lane at one place since the warp last met.
#pragma once

#include <stdint.h>

#include <deque>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <unordered_map>
#include <vector>

namespace simt {

enum class Space : uint8_t { shared, global };

struct Place {  // of an access in the source
  const char* operation;
  Space space;
  std::source_location at;
};
uint16_t place_number(const char* operation, Space space, const std::source_location& at);
const Place& place(uint16_t number);

struct Traffic {
  std::string operation, file;
  unsigned line = 0;
  uint64_t requests = 0;  // of a warp
  uint64_t units = 0;     // wavefronts (shared) or sectors (global)
  uint64_t ideal = 0;     // the same bytes without bank conflict or half-used sector
  uint64_t bytes = 0;     // asked for, by all lanes
  void add(const Traffic& other);
};

struct Counters {  // of all launches of one kernel
  uint64_t launches = 0, blocks = 0, threads = 0, shared_bytes = 0;
  std::map<std::string, uint64_t> matrix;      // warp-wide matrix instructions
  std::map<uint16_t, Traffic> shared, global;  // by place_number
  uint64_t read_footprint = 0,
           write_footprint = 0;  // bytes in distinct sectors of global memory, summed over launches

  Traffic total(Space space, const std::string& operation = "") const;  // all operations when empty
  std::string json(const std::string& kernel) const;                    // one line
};

// Wavefronts of one request: `offsets[i]` of the lanes in `mask`, `bytes` each. *ideal: the same without bank conflicts.
unsigned wavefronts(const uint64_t* offsets, uint32_t mask, int bytes, unsigned* ideal);
unsigned sectors(const uint64_t* addresses, uint32_t mask, int bytes, unsigned* ideal);

class Footprint {
 public:
  void add(uint64_t address);
  uint64_t bytes() const { return 32 * sectors_; }

 private:
  struct Page {
    uint64_t bits[2] = {};  // 128 sectors of 32 bytes
  };
  std::unordered_map<uint64_t, Page> pages_;
  uint64_t last_ = ~uint64_t{0}, sectors_ = 0;
  Page* page_ = nullptr;
};

class Meter {
 public:
  explicit Meter(Counters& counters) : counters_(counters) {}
  ~Meter();
  void start_block(int warps);
  // `bytes` 0: the lane takes part but asks for nothing.
  void access(uint16_t place, int thread, uint64_t address, int bytes, bool write);
  void request(uint16_t place, const uint64_t* addresses, uint32_t mask,
               int bytes);  // of a whole warp at once
  void meet(int warp);      // its lanes are all here
  Counters& counters() { return counters_; }

 private:
  struct Request {
    uint32_t here = 0, mask = 0;
    int bytes = 0;
    uint64_t address[32];
  };
  struct Queue {
    std::deque<Request> open;
    uint64_t closed = 0, taken[32] = {};
  };
  Counters& counters_;
  std::vector<std::unordered_map<uint16_t, Queue>> warps_;
  Footprint read_, written_;
};

}  // namespace simt
