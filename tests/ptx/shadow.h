// SPDX-License-Identifier: Apache-2.0
// Race detection. Clocks: what each thread of a block knows to have happened in the others (vector clocks, joined by barriers
// and syncwarps). Shadow: one cell a byte with its last writer and its readers since; an access that is not ordered after them
// is a race in every schedule, not only in the one that ran. Equal-value writes are no race (many compilers rely on that).
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

namespace lissom::ptx {

constexpr int kLanes = 32;

class Clocks {
 public:
  using Vector = std::vector<uint32_t>;  // for each thread: the last of its epochs that is known

  explicit Clocks(int threads);
  void reset();
  // The epoch of a warp grows with each release by any of its lanes, so that later accesses are not covered by it.
  uint32_t epoch(int thread) const { return epochs_[thread / kLanes]; }
  bool ordered(int me, int other, uint32_t epoch) const {
    return me == other || (*known_[me])[other] >= epoch;
  }
  // Adds what the lanes know and have done to `sum` (empty at first) and starts their warp's next epoch.
  void release(int warp, uint32_t lanes, Vector& sum);
  void acquire(int warp, uint32_t lanes, std::shared_ptr<const Vector> sum);
  void syncwarp(int warp, uint32_t lanes);

 private:
  std::vector<std::shared_ptr<const Vector>> known_;
  std::vector<uint32_t> epochs_;
};

struct Access {
  const Clocks* clocks;
  uint32_t block;  // 1, 2, ...: blocks of a grid are never ordered
  int thread;
  int pc;
  bool atomic = false;  // atomics do not race with each other
};

class Shadow {
 public:
  // `base` of the memory, so that an aligned access lies in one page of cells.
  Shadow(const void* base, size_t bytes, bool initialised);
  void clear();
  // Each throws Fault. `fresh` are the bytes about to be written over `old`; null: no exemption for equal values.
  void read(const Access&, size_t at, size_t bytes);
  void write(const Access&, size_t at, size_t bytes, const uint8_t* old, const uint8_t* fresh);
  // Each byte was written in this launch, or none was (what ld.global.nc wants).
  void require(bool written, size_t at, size_t bytes);
  // A copy was issued: nobody may touch the bytes until its issuer has waited for it.
  void begin_copy(const Access&, size_t at, size_t bytes);
  void end_copy(const Access&, size_t at, size_t bytes);

 private:
  struct Cell {
    uint32_t block = 0, epoch = 0;  // of the last write, or block only: of the reads
    int32_t readers = -1;           // list in pool_, -1: none
    int32_t pc = 0;
    uint16_t thread = 0;
    bool written = false, atomic = false, copying = false,
         foreign_reads = false;  // foreign: by an earlier block
  };
  struct Readers {  // lanes of one warp that read in one epoch
    uint32_t epoch, lanes;
    int32_t next, pc;
    uint16_t warp;
  };
  void enter(const Access&, Cell&);
  void note_read(const Access&, Cell&);
  void check_readers(const Access&, const Cell&, size_t at) const;
  bool behind_writer(const Access&, const Cell&) const;
  bool all_ordered(const Access&, const Readers&) const;
  void forget_readers(Cell&);
  [[noreturn]] void report(const char* what, const Access&, const Cell&, size_t at) const;

  static constexpr size_t kPage = 256;
  Cell* cells(size_t at);  // as far as one access goes

  bool initialised_;
  size_t shift_;
  std::vector<std::unique_ptr<Cell[]>> pages_;
  std::vector<Readers> pool_;
  int32_t free_ = -1;
};

}  // namespace lissom::ptx
