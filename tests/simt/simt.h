// SPDX-License-Identifier: Apache-2.0
// Runs CUDA kernels as C++, one fiber a thread and one block after the other, and reports what a GPU would leave undefined.
// A kernel written against dev.cuh is compiled by the host compiler with -DLISSOM_SIMT -Itests/simt and launched as usual:
//
//     simt::Buffer<float> y(n);                    // global memory is plain host memory; a Buffer adds bounds
//     simt::Run run;                               // launches go to the newest Run of the scope
//     run.schedule = simt::Schedule::random;  run.seed = 7;  run.landing = simt::Landing::late;
//     int error = launch_my_kernel(x, y.data(), n, /*stream=*/nullptr);
//     if (run.fault) puts(run.fault->text.c_str());
//     run.counters("my_kernel").matrix.at("mma_sp_m16n8k32")
//
// The first fault ends the launch (it returns kLaunchFailure) and refuses later ones. What is reported: Kind, below.
//
// Built with g++ -std=c++20 -rdynamic; kernels with external linkage, else they have no name in reports and counters.
// Not modelled: time, weak ordering of memory between blocks (a kernel in which one block needs another's data is reported), the
// rounding of tensor cores, limits on registers, launch bounds. Reads of global memory are remembered only on the read-only path, so
// a plain read that another thread then overwrites is found when some schedule turns the two around.
#pragma once

#include <stdint.h>
#include <stdlib.h>

#include <map>
#include <memory>
#include <optional>
#include <source_location>
#include <string>
#include <vector>

#include "counters.h"

namespace simt {

using Site = std::source_location;

// Which runnable thread goes on; blocks follow the same order. `random`: priorities of warps that rarely change, and now and
// then a thread is interrupted between two accesses to memory.
enum class Schedule { forward, reverse, random };

// When an asynchronous copy moves its bytes: at its issue, in the wait that completes it, or anywhere between.
enum class Landing { early, late, random };

enum class Kind {
  race,           // two accesses to one address, one a write, without a barrier between them
  in_flight,      // a touch of bytes under an asynchronous copy that was not waited for
  uninitialised,  // a read of shared memory that nobody wrote
  bounds,         // outside of shared memory or of every Buffer
  misaligned,     // an address that is no multiple of the size of its access
  divergence,     // lanes or threads that should do one thing together do two
  deadlock,       // nobody can go on
  read_only,      // read-only path used for bytes that this launch writes
  operand,        // illegal metadata, copy size, barrier count, shuffle width...
  launch,         // block or shared memory that no target takes
};
const char* name(Kind kind);

struct Fault {
  Kind kind;
  unsigned line;     // of the access
  std::string text;  // the whole report
};

constexpr int kInvalidValue = 1, kInvalidConfiguration = 9, kLaunchFailure = 719;  // as cudaError_t

class Run {
 public:
  Run();
  ~Run();
  Run(const Run&) = delete;
  Run& operator=(const Run&) = delete;

  Schedule schedule = Schedule::forward;
  Landing landing = Landing::early;
  uint64_t seed = 1;
  bool detector = true;  // false: values only, no report of race, in_flight, uninitialised, read_only
  int max_shared_bytes = 163 * 1024;  // a block's limit on the target
  std::optional<Fault> fault;
  std::map<std::string, Counters> kernels;  // by name

  const Counters& counters(const std::string& part) const;  // of the one kernel whose name contains `part`
  std::string json() const;                                 // of all kernels, one line
  static Run* current();
};

// Global memory with known bounds: while any Buffer lives, each global access must lie inside of one. Aligned as cudaMalloc
// does, and exact to the byte under AddressSanitizer.
void watch(const void* from, size_t bytes);
void unwatch(const void* from);

template <class T>
class Buffer {
 public:
  explicit Buffer(size_t count, T fill = T{}) : count_(count) {
    void* memory = nullptr;
    if (posix_memalign(&memory, 256, count ? count * sizeof(T) : 1) != 0) abort();
    data_.reset(static_cast<T*>(memory));
    for (size_t i = 0; i < count; ++i) data_.get()[i] = fill;
    watch(memory, count * sizeof(T));
  }
  ~Buffer() { unwatch(data_.get()); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  T* data() const { return data_.get(); }
  size_t size() const { return count_; }
  T& operator[](size_t i) const { return data_.get()[i]; }
  T* begin() const { return data(); }
  T* end() const { return data() + count_; }

 private:
  struct Free {
    void operator()(T* p) const { free(p); }
  };
  std::unique_ptr<T, Free> data_;
  size_t count_;
};

}  // namespace simt
