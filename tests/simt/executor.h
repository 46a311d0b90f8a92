// SPDX-License-Identifier: Apache-2.0
// What dev_simt.h calls: the thread that runs now, and one function for each thing it can do.
#pragma once

#include <stdint.h>

#include <functional>

#include "simt.h"

namespace simt {

struct Index {
  int thread, threads, block[3], grid[3];
};
const Index& index();

// `read_only`: the path that may be cached for the whole launch.
void global_read(void* out, const void* from, int bytes, bool read_only, Site at);
void global_write(void* to, const void* in, int bytes, Site at);
void shared_read(void* out, uint32_t offset, int bytes, Site at);
void shared_write(uint32_t offset, const void* in, int bytes, Site at);
// Plain memory of an atomic, checked and counted; the caller updates it (nobody else runs meanwhile).
void* global_atomic(void* p, int bytes, Site at);
void* shared_atomic(uint32_t offset, int bytes, Site at);

void copy_issue(uint32_t dst, const void* src, int bytes, int src_bytes, Site at);
void copy_commit();
void copy_wait(int newest);  // until at most `newest` committed groups of this thread are unfinished

void block_barrier(Site at);
void named_barrier(int id, int count, bool wait, Site at);
void warp_barrier(Site at);

// A warp-wide operation. Every lane enters with its operands; true for the last one, which does the work for all, with
// operands(lane), and then calls leave().
bool warp_enter(const char* operation, void* operands, Site at);
void* operands(int lane);
void warp_leave();
template <class Lane, class Work>
void collective(const char* operation, Lane& mine, Site at, Work work) {
  if (!warp_enter(operation, &mine, at)) return;
  work([](int lane) -> Lane& { return *static_cast<Lane*>(operands(lane)); });
  warp_leave();
}

// Inside a collective's work: rows[i] are 16 bytes of shared memory that lane i names, eight a phase.
void matrix_read(unsigned char (*rows)[16], const uint32_t* offsets, int count, Site at);
void count_matrix(const char* operation);

[[noreturn]] void fail(Kind kind, Site at, const char* format, ...) __attribute__((format(printf, 3, 4)));

int launch(const void* kernel, const int64_t (&grid)[3], int threads, int shared_bytes,
           const std::function<void()>& body);

}  // namespace simt
