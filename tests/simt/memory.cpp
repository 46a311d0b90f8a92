// SPDX-License-Identifier: Apache-2.0
// Every access to shared and global memory, and the asynchronous copies between them.
#include <string.h>

#include "block.h"

namespace simt {
namespace {

std::map<uint64_t, size_t>& buffers() {
  static std::map<uint64_t, size_t> all;
  return all;
}

uint64_t number(const void* p) { return reinterpret_cast<uint64_t>(p); }

void check_global(const void* p, int bytes, int alignment, Site at, const char* operation) {
  if (number(p) % alignment)
    fail(Kind::misaligned, at, "%s of %d bytes at global address %p", operation, alignment, p);
  if (buffers().empty()) return;
  auto after = buffers().upper_bound(number(p));
  if (after != buffers().begin()) {
    --after;
    if (number(p) + bytes <= after->first + after->second) return;
    fail(Kind::bounds, at, "%s of %d bytes at byte %llu of a buffer of %zu", operation, bytes,
         static_cast<unsigned long long>(number(p) - after->first), after->second);
  }
  fail(Kind::bounds, at, "%s of %d bytes at %p, in front of every buffer", operation, bytes, p);
}

}  // namespace

void watch(const void* from, size_t bytes) { buffers()[number(from)] = bytes; }
void unwatch(const void* from) { buffers().erase(number(from)); }

// --- checks ---
Access Block::access(uint16_t place) const {
  return {clocks.now(now.thread), static_cast<uint16_t>(now.thread), place, 3, false};
}

void Block::inside(uint32_t offset, int bytes, Site at, const char* operation) {
  if (offset % bytes)
    fail(Kind::misaligned, at, "%s of %d bytes at shared byte %d", operation, bytes,
         static_cast<int>(offset));
  if (offset > shared.size() || shared.size() - offset < static_cast<size_t>(bytes))
    fail(Kind::bounds, at, "%s of %d bytes at shared byte %d of %zu", operation, bytes,
         static_cast<int>(offset), shared.size());
}

void Block::check(const Shadow::Found& found, int bytes, uint16_t mine) {
  if (!found) return;
  const Place &here = place(mine), &there = place(found->other.site);
  char other[300] = "";
  if (found->other.clock)
    snprintf(other, sizeof other, "%s of thread %d (warp %d lane %d) at %s:%u", there.operation,
             found->other.thread, found->other.thread / 32, found->other.thread % 32, there.at.file_name(),
             there.at.line());
  switch (found->wrong) {
    case Shadow::Wrong::race:
      fail(Kind::race, here.at, "%s of %d bytes, shared byte %u, not ordered against\n  %s", here.operation,
           bytes, found->offset, other);
    case Shadow::Wrong::in_flight:
      fail(Kind::in_flight, here.at, "%s of %d bytes, shared byte %u, while the copy may still move: \n  %s",
           here.operation, bytes, found->offset, other);
    case Shadow::Wrong::uninitialised:
      fail(Kind::uninitialised, here.at, "%s of %d bytes, shared byte %u was never written by this block",
           here.operation, bytes, found->offset);
  }
}

void Block::check_global_order(const void* p, int bytes, uint16_t mine, Use use) {
  const bool write = use == Use::write || use == Use::atomic;
  if (!launch.run.detector || (use == Use::read && launch.written.empty())) return;
  const Place& here = place(mine);
  const uint64_t page = number(p) / kPage, begin = number(p) % kPage,
                 end = begin + bytes;  // aligned: one page
  if (use == Use::read_only) {
    auto& loaded = launch.read_only[page];
    for (uint64_t byte = begin; byte < end; ++byte) loaded.set(byte);
  }
  if (const auto loaded = launch.read_only.find(page); write && loaded != launch.read_only.end())
    for (uint64_t byte = begin; byte < end; ++byte)
      if (loaded->second[byte])
        fail(Kind::read_only, here.at, "%s to bytes that this launch loads by the read-only path",
             here.operation);
  auto found = launch.written.find(page);
  if (found == launch.written.end()) {
    if (!write) return;
    found = launch.written.emplace(page, std::vector<Written>(kPage / 2)).first;
  }
  for (uint64_t cell = begin / 2; 2 * cell < end; ++cell) {
    Written& last = found->second[cell];
    Access a = access(mine);
    a.bytes = static_cast<uint8_t>((2 * cell >= begin ? 1 : 0) | (2 * cell + 1 < end ? 2 : 0));
    a.atomic = use == Use::atomic;
    const bool known = last.by.bytes & a.bytes, same_block = last.block == block_number;
    const bool ordered =
        same_block && (last.several ? last.phase != shadow.phase() : clocks.ordered(last.by, now.thread));
    const Place& there = place(last.by.site);
    if (known && use == Use::read_only)
      fail(Kind::read_only, here.at, "%s of bytes that this launch writes: %s at %s:%u", here.operation,
           there.operation, there.at.file_name(), there.at.line());
    if (known && !ordered && !(a.atomic && last.by.atomic))
      fail(Kind::race, here.at,
           "%s of %d bytes at %p of global memory, not ordered against\n  %s at %s:%u, block %u thread %d",
           here.operation, bytes, p, there.operation, there.at.file_name(), there.at.line(), last.block,
           last.by.thread);
    if (write) last = {block_number, a, known && !ordered, shadow.phase()};
  }
}

// --- global ---
void global_read(void* out, const void* from, int bytes, bool read_only, Site at) {
  Block& b = block();
  b.interrupt();
  const uint16_t mine = place_number(read_only ? "load" : "load_plain", Space::global, at);
  check_global(from, bytes, bytes, at, "load");
  b.check_global_order(from, bytes, mine, read_only ? Use::read_only : Use::read);
  b.launch.meter.access(mine, b.now.thread, number(from), bytes, false);
  memcpy(out, from, bytes);
}

void global_write(void* to, const void* in, int bytes, Site at) {
  Block& b = block();
  b.interrupt();
  const uint16_t mine = place_number("store", Space::global, at);
  check_global(to, bytes, bytes, at, "store");
  b.check_global_order(to, bytes, mine, Use::write);
  b.launch.meter.access(mine, b.now.thread, number(to), bytes, true);
  memcpy(to, in, bytes);
}

void* global_atomic(void* p, int bytes, Site at) {
  Block& b = block();
  b.interrupt();
  const uint16_t mine = place_number("atomic", Space::global, at);
  check_global(p, bytes, bytes, at, "atomic");
  b.check_global_order(p, bytes, mine, Use::atomic);
  b.launch.meter.access(mine, b.now.thread, number(p), bytes, true);
  return p;
}

// --- shared ---
namespace {
template <class Check>
unsigned char* shared_access(const char* operation, uint32_t offset, int bytes, Site at, Check check) {
  Block& b = block();
  b.interrupt();
  const uint16_t mine = place_number(operation, Space::shared, at);
  b.inside(offset, bytes, at, operation);
  if (b.launch.run.detector) b.check(check(b, b.access(mine)), bytes, mine);
  b.launch.meter.access(mine, b.now.thread, offset, bytes, false);
  return b.shared.data() + offset;
}
}  // namespace

void shared_read(void* out, uint32_t offset, int bytes, Site at) {
  memcpy(out,
         shared_access("load", offset, bytes, at,
                       [&](Block& b, Access a) { return b.shadow.read(b.clocks, a, offset, bytes); }),
         bytes);
}

void shared_write(uint32_t offset, const void* in, int bytes, Site at) {
  memcpy(shared_access("store", offset, bytes, at,
                       [&](Block& b, Access a) { return b.shadow.write(b.clocks, a, offset, bytes); }),
         in, bytes);
}

void* shared_atomic(uint32_t offset, int bytes, Site at) {
  return shared_access("atomic", offset, bytes, at,
                       [&](Block& b, Access a) { return b.shadow.atomic(b.clocks, a, offset, bytes); });
}

void matrix_read(unsigned char (*rows)[16], const uint32_t* offsets, int count, Site at) {
  Block& b = block();
  const uint16_t mine = place_number("ldmatrix", Space::shared, at);
  const int first = b.now.thread / 32 * 32;
  uint64_t wide[32] = {};
  for (int i = 0; i < count; ++i) {
    b.inside(offsets[i], 16, at, "ldmatrix");
    Access a = b.access(mine);
    a.thread = static_cast<uint16_t>(first + i);  // the lane that names the row
    a.clock = b.clocks.now(a.thread);
    if (b.launch.run.detector) b.check(b.shadow.read(b.clocks, a, offsets[i], 16, true), 16, mine);
    memcpy(rows[i], b.shared.data() + offsets[i], 16);
    wide[i] = offsets[i];
  }
  b.launch.meter.request(mine, wide, count == 32 ? 0xffffffffu : (1u << count) - 1, 16);
}

// --- asynchronous copies ---
void copy_issue(uint32_t dst, const void* src, int bytes, int src_bytes, Site at) {
  Block& b = block();
  b.interrupt();
  const uint16_t to = place_number("cp_async", Space::shared, at),
                 from = place_number("cp_async", Space::global, at);
  if (src_bytes < 0 || src_bytes > bytes)
    fail(Kind::operand, at, "cp_async of %d bytes out of %d; 0 to %d may be read", src_bytes, bytes, bytes);
  b.inside(dst, bytes, at, "cp_async");
  check_global(src, src_bytes, bytes, at, "cp_async");
  b.check_global_order(src, src_bytes, from, Use::read);
  if (b.launch.run.detector) b.check(b.shadow.copy_begin(b.clocks, b.access(to), dst, bytes), bytes, to);
  b.launch.meter.access(to, b.now.thread, dst, bytes, false);
  b.launch.meter.access(from, b.now.thread, number(src), src_bytes ? bytes : 0, false);
  b.copies.push_back(
      {dst, static_cast<const unsigned char*>(src), bytes, src_bytes, b.now.thread, to, false});
  Copy& copy = b.copies.back();
  b.thread().open.push_back(&copy);
  switch (b.launch.run.landing) {
    case Landing::early: b.land(copy); break;
    case Landing::late: break;
    case Landing::random: b.landings.emplace(b.step + 1 + b.launch.random() % 256, &copy); break;
  }
}

void Block::land(Copy& copy) {
  if (copy.landed) return;
  copy.landed = true;
  memcpy(shared.data() + copy.dst, copy.src, copy.src_bytes);
  memset(shared.data() + copy.dst + copy.src_bytes, 0, copy.bytes - copy.src_bytes);
}

void copy_commit() {
  Thread& t = block().thread();
  t.groups.push_back(std::move(t.open));
  t.open.clear();
}

void copy_wait(int newest) {
  Block& b = block();
  auto& groups = b.thread().groups;
  for (; static_cast<int>(groups.size()) > newest; groups.pop_front())
    for (Copy* copy : groups.front()) {
      b.land(*copy);
      if (b.launch.run.detector) b.shadow.copy_end(b.access(copy->place), copy->dst, copy->bytes);
    }
}

}  // namespace simt
