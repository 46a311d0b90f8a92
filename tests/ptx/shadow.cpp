// SPDX-License-Identifier: Apache-2.0
#include "shadow.h"

#include <algorithm>

#include "machine.h"

namespace lissom::ptx {

Clocks::Clocks(int threads) : known_(threads), epochs_((threads + kLanes - 1) / kLanes) { reset(); }

void Clocks::reset() {
  const auto nothing = std::make_shared<const Vector>(known_.size());
  std::fill(known_.begin(), known_.end(), nothing);
  std::fill(epochs_.begin(), epochs_.end(), 1u);
}

void Clocks::release(int warp, uint32_t lanes, Vector& sum) {
  sum.resize(known_.size());
  const Vector* last = nullptr;
  for (int lane = 0; lane < kLanes; ++lane) {
    if (!(lanes >> lane & 1)) continue;
    const int thread = warp * kLanes + lane;
    if (const Vector* known = known_[thread].get(); known != last) {
      for (size_t i = 0; i < sum.size(); ++i) sum[i] = std::max(sum[i], (*known)[i]);
      last = known;
    }
    sum[thread] = epochs_[warp];
  }
  ++epochs_[warp];
}

void Clocks::acquire(int warp, uint32_t lanes, std::shared_ptr<const Vector> sum) {
  for (int lane = 0; lane < kLanes; ++lane)
    if (lanes >> lane & 1) known_[warp * kLanes + lane] = sum;
}

void Clocks::syncwarp(int warp, uint32_t lanes) {
  auto sum = std::make_shared<Vector>();
  release(warp, lanes, *sum);
  acquire(warp, lanes, std::move(sum));
}

Shadow::Shadow(const void* base, size_t bytes, bool initialised)
    : initialised_(initialised),
      shift_(reinterpret_cast<uintptr_t>(base) % kPage),
      pages_((bytes + shift_) / kPage + 1) {}

void Shadow::clear() {
  for (auto& page : pages_)
    for (size_t i = 0; page && i < kPage; ++i) page[i] = {};
  pool_.clear();
  free_ = -1;
}

Shadow::Cell* Shadow::cells(size_t at) {
  auto& page = pages_[(at + shift_) / kPage];
  if (!page) page = std::make_unique<Cell[]>(kPage);
  return &page[(at + shift_) % kPage];
}

bool Shadow::behind_writer(const Access& a, const Cell& c) const {
  if (!c.written || (a.atomic && c.atomic)) return true;
  return c.block == a.block && a.clocks->ordered(a.thread, c.thread, c.epoch);
}

bool Shadow::all_ordered(const Access& a, const Readers& r) const {
  for (int lane = 0; lane < kLanes; ++lane)
    if (r.lanes >> lane & 1 && !a.clocks->ordered(a.thread, r.warp * kLanes + lane, r.epoch)) return false;
  return true;
}

void Shadow::report(const char* what, const Access& a, const Cell& c, size_t at) const {
  if (c.block != a.block)
    fault("%s: byte %zu, touched by block %u of the same launch at instruction %d", what, at, c.block - 1,
          c.pc);
  fault("%s: byte %zu, by thread %d and by thread %d at instruction %d", what, at, a.thread, c.thread, c.pc);
}

void Shadow::forget_readers(Cell& c) {
  while (c.readers >= 0) {
    const int32_t next = pool_[c.readers].next;
    pool_[c.readers].next = free_;
    free_ = c.readers;
    c.readers = next;
  }
}

// Cells keep the readers of one block only; of earlier blocks it is enough to know that there were some.
void Shadow::enter(const Access& a, Cell& c) {
  if (c.block == a.block) return;
  if (c.readers >= 0) c.foreign_reads = true;
  forget_readers(c);
}

void Shadow::note_read(const Access& a, Cell& c) {
  const int warp = a.thread / kLanes;
  const uint32_t epoch = a.clocks->epoch(a.thread), bit = 1u << (a.thread % kLanes);
  int32_t* link = &c.readers;
  while (*link >= 0) {
    Readers& r = pool_[*link];
    if (r.warp == warp && r.epoch == epoch) {
      r.lanes |= bit;
      return;
    }
    if (all_ordered(a, r)) {  // what is ordered after this read is ordered after those
      const int32_t gone = *link;
      *link = r.next;
      r.next = free_;
      free_ = gone;
    } else {
      link = &r.next;
    }
  }
  const Readers fresh{epoch, bit, -1, a.pc, static_cast<uint16_t>(warp)};
  if (free_ < 0) {
    const auto end = static_cast<int32_t>(pool_.size());
    *link = end;
    pool_.push_back(fresh);  // `link` may dangle from here on
  } else {
    *link = free_;
    free_ = pool_[*link].next;
    pool_[*link] = fresh;
  }
}

void Shadow::check_readers(const Access& a, const Cell& c, size_t at) const {
  if (c.foreign_reads)
    fault("race between blocks: write of byte %zu that an earlier block of the launch read", at);
  for (int32_t i = c.readers; i >= 0; i = pool_[i].next) {
    const Readers& r = pool_[i];
    if (!all_ordered(a, r))
      fault(
          "race: byte %zu is written by thread %d while lanes %08x of warp %d may still read it at "
          "instruction %d",
          at, a.thread, r.lanes, r.warp, r.pc);
  }
}

void Shadow::read(const Access& a, size_t at, size_t bytes) {
  Cell* c = cells(at);
  for (const Cell* end = c + bytes; c < end; ++c, ++at) {
    if (c->copying) report("read under an unfinished asynchronous copy", a, *c, at);
    if (!c->written && !initialised_) fault("read of shared memory that nobody wrote: byte %zu", at);
    if (!behind_writer(a, *c)) report("race: read of what is being written", a, *c, at);
    enter(a, *c);
    if (!c->written) c->block = a.block;
    note_read(a, *c);
  }
}

void Shadow::write(const Access& a, size_t at, size_t bytes, const uint8_t* old, const uint8_t* fresh) {
  Cell* c = cells(at);
  for (size_t i = 0; i < bytes; ++i, ++c, ++at) {
    if (c->copying) report("write under an unfinished asynchronous copy", a, *c, at);
    enter(a, *c);
    const bool equal = fresh && c->written && !a.atomic && !c->atomic && old[i] == fresh[i];
    if (!equal && !behind_writer(a, *c)) report("race: two writes of different values", a, *c, at);
    check_readers(a, *c, at);
    forget_readers(*c);
    *c = {
        a.block, a.clocks->epoch(a.thread), -1, a.pc, static_cast<uint16_t>(a.thread), true, a.atomic, false,
        false};
  }
}

void Shadow::require(bool written, size_t at, size_t bytes) {
  const Cell* c = cells(at);
  for (size_t i = 0; i < bytes; ++i) {
    if (written && !c[i].written) fault("read of shared memory that nobody wrote: byte %zu", at + i);
    if (!written && c[i].written) fault("ld.global.nc of byte %zu, which this launch has written", at + i);
  }
}

void Shadow::begin_copy(const Access& a, size_t at, size_t bytes) {
  write(a, at, bytes, nullptr, nullptr);
  Cell* c = cells(at);
  for (size_t i = 0; i < bytes; ++i) c[i].copying = true;
}

void Shadow::end_copy(const Access& a, size_t at, size_t bytes) {
  Cell* c = cells(at);
  for (size_t i = 0; i < bytes; ++i) {
    c[i].copying = false;
    c[i].epoch = a.clocks->epoch(a.thread);
    c[i].pc = a.pc;
  }
}

}  // namespace lissom::ptx
