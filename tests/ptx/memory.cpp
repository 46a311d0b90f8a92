// SPDX-License-Identifier: Apache-2.0
// Checked memory: registered buffers, shared memory with its shadow, local memory, parameters, asynchronous copies.
#include <cstdarg>
#include <cstring>

#include "machine.h"

namespace lissom::ptx {

void fault(const char* format, ...) {
  va_list args;
  va_start(args, format);
  char text[1024];
  vsnprintf(text, sizeof text, format, args);
  va_end(args);
  throw Fault(text);
}

// --- global memory ---

void Memory::add(void* base, size_t bytes, bool writable, std::string name) {
  const auto from = reinterpret_cast<uint64_t>(base);
  const auto next = buffers_.lower_bound(from);
  if (next != buffers_.end() && next->first < from + bytes && next->first != from)
    fault("buffer %s overlaps %s", name.c_str(), next->second.name.c_str());
  if (next != buffers_.begin()) {
    const Buffer& before = std::prev(next)->second;
    if (std::prev(next)->first + before.bytes > from)
      fault("buffer %s overlaps %s", name.c_str(), before.name.c_str());
  }
  buffers_[from] = Buffer{static_cast<uint8_t*>(base), bytes, writable, std::move(name), nullptr};
}

void Memory::remove(const void* base) { buffers_.erase(reinterpret_cast<uint64_t>(base)); }

void Memory::begin_launch(bool shadow) {
  for (auto& [from, b] : buffers_)
    b.shadow = b.writable && shadow ? std::make_unique<Shadow>(b.base, b.bytes, true) : nullptr;
}

Buffer& Memory::find(uint64_t address, size_t bytes) {
  auto it = buffers_.upper_bound(address);
  if (it == buffers_.begin())
    fault("global address %#llx lies in no buffer", static_cast<unsigned long long>(address));
  Buffer& b = std::prev(it)->second;
  const uint64_t at = address - std::prev(it)->first;
  if (at > b.bytes || bytes > b.bytes - at)
    fault("out of bounds: %zu bytes at offset %llu of buffer %s of %zu bytes", bytes,
          static_cast<unsigned long long>(at), b.name.c_str(), b.bytes);
  return b;
}

// --- one access ---

Access Block::access(const Warp& w, int lane, bool atomic) const {
  return {&clocks_, number_, w.thread(lane), w.pc, atomic};
}

Block::Place Block::place(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes,
                          const char* verb) {
  if (space == Space::generic) {
    space = address - kSharedWindow < kWindow  ? Space::shared
            : address - kLocalWindow < kWindow ? Space::local
                                               : Space::global;
    address -= space == Space::shared ? kSharedWindow : space == Space::local ? kLocalWindow : 0;
  }
  if (address % bytes)
    fault("misaligned %s of %u bytes by thread %d: address %#llx", verb, bytes, w.thread(lane),
          static_cast<unsigned long long>(address));
  const auto inside = [&](uint64_t first, uint64_t size, const char* what) {
    if (address < first || address - first > size || bytes > size - (address - first))
      fault("out of bounds: %s of %u bytes by thread %d at byte %lld of %s memory of %llu bytes", verb, bytes,
            w.thread(lane), static_cast<long long>(address - first), what,
            static_cast<unsigned long long>(size));
    return static_cast<size_t>(address - first);
  };
  switch (space) {
    case Space::shared: {
      const size_t at = inside(kSharedBase, shared_.size(), "shared");
      return {shared_.data() + at, shadow_.get(), at, nullptr};
    }
    case Space::local: {
      const size_t size = kernel_.local_bytes > kLocalBase ? kernel_.local_bytes - kLocalBase : 0;
      const size_t at = inside(kLocalBase, size, "local");
      return {w.local.data() + lane * size + at, nullptr, 0, nullptr};
    }
    case Space::param: {
      const size_t at = inside(0, launch.params.size(), "parameter");
      return {launch.params.data() + at, nullptr, 0, nullptr};
    }
    case Space::constant:
      for (auto& [name, g] : launch.module.globals)
        if (g.space == Space::constant && address - reinterpret_cast<uint64_t>(g.data) < g.bytes) {
          const size_t at = inside(reinterpret_cast<uint64_t>(g.data), g.bytes, name.c_str());
          return {g.data + at, nullptr, 0, nullptr};
        }
      fault("constant address %#llx lies in no variable", static_cast<unsigned long long>(address));
    default: {
      Buffer& b = launch.memory.find(address, bytes);
      const auto at = static_cast<size_t>(address - reinterpret_cast<uint64_t>(b.base));
      return {b.base + at, b.shadow.get(), at, &b};
    }
  }
}

const uint8_t* Block::read(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes, bool read_only) {
  const Place p = place(w, lane, space, address, bytes, "read");
  if (p.shadow) {
    if (read_only && p.buffer) p.shadow->require(false, p.at, bytes);
    p.shadow->read(access(w, lane), p.at, bytes);
  }
  return p.data;
}

void Block::write(Warp& w, int lane, Space space, uint64_t address, const void* data, uint32_t bytes) {
  if (space == Space::param || space == Space::constant) fault("write to read-only memory");
  const Place p = place(w, lane, space, address, bytes, "write");
  if (p.buffer && !p.buffer->writable)
    fault("write to buffer %s, which is read-only", p.buffer->name.c_str());
  if (p.shadow) p.shadow->write(access(w, lane), p.at, bytes, p.data, static_cast<const uint8_t*>(data));
  std::memcpy(p.data, data, bytes);
}

uint8_t* Block::atomic(Warp& w, int lane, Space space, uint64_t address, uint32_t bytes) {
  const Place p = place(w, lane, space, address, bytes, "atomic");
  if (p.buffer ? !p.buffer->writable : !p.shadow)
    fault("atomic on memory that is neither shared nor a writable buffer");
  if (p.shadow && !p.buffer) p.shadow->require(true, p.at, bytes);
  if (p.shadow) p.shadow->write(access(w, lane, true), p.at, bytes, nullptr, nullptr);
  return p.data;
}

// --- asynchronous copies ---

void Block::issue_copy(Warp& w, int lane, uint64_t to, uint64_t from, uint32_t bytes, uint32_t source_bytes) {
  if (from % bytes)
    fault("misaligned source of an asynchronous copy of %u bytes: %#llx", bytes,
          static_cast<unsigned long long>(from));
  const Place p = place(w, lane, Space::shared, to, bytes, "asynchronous copy");
  const uint8_t* source = nullptr;
  if (source_bytes || launch.options.strict_zero_fill) {
    Buffer& b = launch.memory.find(from, source_bytes);
    const auto at = static_cast<size_t>(from - reinterpret_cast<uint64_t>(b.base));
    if (b.shadow && source_bytes) b.shadow->read(access(w, lane), at, source_bytes);
    source = b.base + at;
  }
  shadow_->begin_copy(access(w, lane), p.at, bytes);
  std::memset(p.data, 0xcb, bytes);  // nobody may rely on what lies there until the wait
  Copies& copies = copies_[w.thread(lane)];
  copies.open.push_back({w.thread(lane), lane, p.at, bytes, source_bytes, source, false});
  if (launch.options.landing == 0) land(copies.open.back());
  maybe_land(copies);
}

void Block::land(Copy& c) {
  if (c.landed) return;
  c.landed = true;
  if (c.source_bytes) std::memcpy(&shared_[c.at], c.source, c.source_bytes);
  std::memset(&shared_[c.at] + c.source_bytes, 0, c.bytes - c.source_bytes);
}

void Block::maybe_land(Copies& copies) {
  if (launch.options.landing != 2) return;
  const auto chance = [&](std::vector<Copy>& group) {
    for (Copy& c : group)
      if (random() % 4 == 0) land(c);
  };
  chance(copies.open);
  for (auto& group : copies.groups) chance(group);
}

void Block::finish(Warp& w, std::vector<Copy>& group) {
  for (Copy& c : group) {
    land(c);
    shadow_->end_copy(access(w, c.lane), c.at, c.bytes);
  }
}

void Block::commit_copies(Warp& w, int lane) {
  Copies& copies = copies_[w.thread(lane)];
  copies.groups.push_back(std::move(copies.open));
  copies.open.clear();
  maybe_land(copies);
}

void Block::wait_copies(Warp& w, int lane, size_t unfinished) {
  Copies& copies = copies_[w.thread(lane)];
  maybe_land(copies);
  for (; copies.groups.size() > unfinished; copies.groups.pop_front()) finish(w, copies.groups.front());
}

void Block::wait_all_copies(Warp& w, int lane) {
  wait_copies(w, lane, 0);
  Copies& copies = copies_[w.thread(lane)];
  finish(w, copies.open);
  copies.open.clear();
}

std::vector<uint8_t> pack_params(const Kernel& k, void* const* args) {
  std::vector<uint8_t> block(k.param_bytes);
  for (size_t i = 0; i < k.params.size(); ++i)
    std::memcpy(&block[k.params[i].offset], args[i], k.params[i].bytes);
  return block;
}

}  // namespace lissom::ptx
