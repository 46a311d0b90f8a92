// SPDX-License-Identifier: Apache-2.0
// Data races of one block, found at their first occurrence in any schedule: two accesses to a byte, one of them a write, that no
// barrier orders. Knows nothing of fibers or kernels; feed it accesses and barriers.
#pragma once

#include <stdint.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <vector>

namespace simt {

struct Access {
  uint32_t clock = 0;  // of the thread, 0: no access
  uint16_t thread = 0;
  uint16_t site = 0;  // the caller's number for the place in the source
  uint8_t bytes = 0;  // which bytes of a cell
  bool atomic = false;
};

// Vector clocks. Threads that left a barrier together share one vector of what they know, so a barrier costs one pass.
class Clocks {
 public:
  using Known = std::vector<uint32_t>;
  struct Joint {  // what meets at a barrier
    std::shared_ptr<Known> known;
    std::shared_ptr<const Known> last;
  };

  void reset(int threads) {
    own_.assign(threads, 1);
    known_.assign(threads, std::make_shared<const Known>(threads, 0));
  }
  uint32_t now(int thread) const { return own_[thread]; }
  int threads() const { return static_cast<int>(own_.size()); }

  void arrive(Joint& joint, int thread) {
    if (!joint.known) {
      joint.known = std::make_shared<Known>(*known_[thread]);
    } else if (joint.last != known_[thread]) {
      for (size_t i = 0; i < joint.known->size(); ++i)
        (*joint.known)[i] = std::max((*joint.known)[i], (*known_[thread])[i]);
    }
    joint.last = known_[thread];
    (*joint.known)[thread] = own_[thread]++;
  }
  void depart(const Joint& joint, int thread) { known_[thread] = joint.known; }

  bool ordered(const Access& earlier, int thread) const {
    return earlier.thread == thread || earlier.clock <= (*known_[thread])[earlier.thread];
  }
  // For a read on behalf of all lanes of a warp, which all know the same: even a store of the thread itself must be behind a
  // synchronisation.
  bool ordered_for_warp(const Access& earlier, int thread) const {
    return earlier.clock <= (*known_[thread])[earlier.thread];
  }

 private:
  std::vector<uint32_t> own_;
  std::vector<std::shared_ptr<const Known>> known_;
};

// What happened to each cell of two bytes of shared memory.
class Shadow {
 public:
  enum class Wrong { race, in_flight, uninitialised };
  struct Conflict {
    Wrong wrong;
    Access other;
    uint32_t offset;  // first byte of the cell
  };
  using Found = std::optional<Conflict>;

  void reset(size_t bytes) {
    cells_.assign((bytes + 1) / 2, Cell{});
    phase_ = 0;
  }
  // All threads passed a barrier: what was read before it can no longer clash.
  void next_phase() { ++phase_; }
  uint32_t phase() const { return phase_; }

  Found read(const Clocks& clocks, Access a, uint32_t offset, int bytes, bool whole_warp = false) {
    return each(a, offset, bytes, [&](Cell& cell, uint32_t at) -> Found {
      if (cell.copying) return Conflict{Wrong::in_flight, cell.write, at};
      if ((cell.valid & a.bytes) != a.bytes) return Conflict{Wrong::uninitialised, cell.write, at};
      if ((cell.write.bytes & a.bytes) && !(whole_warp ? clocks.ordered_for_warp(cell.write, a.thread)
                                                       : clocks.ordered(cell.write, a.thread)))
        return Conflict{Wrong::race, cell.write, at};
      if (cell.atomics)
        if (const Access* other = clash(clocks, cell, a, true)) return Conflict{Wrong::race, *other, at};
      remember(clocks, cell, a);
      return {};
    });
  }
  Found write(const Clocks& clocks, Access a, uint32_t offset, int bytes) {
    return each(a, offset, bytes, [&](Cell& cell, uint32_t at) -> Found {
      if (cell.copying) return Conflict{Wrong::in_flight, cell.write, at};
      if ((cell.write.bytes & a.bytes) && !clocks.ordered(cell.write, a.thread))
        return Conflict{Wrong::race, cell.write, at};
      if (const Access* other = clash(clocks, cell, a, false)) return Conflict{Wrong::race, *other, at};
      cell.valid |= a.bytes;
      cell.write = a;
      std::erase_if(cell.since, [&](const Access& e) { return (e.bytes & ~a.bytes) == 0; });
      cell.atomics = !cell.since.empty();
      return {};
    });
  }
  Found atomic(const Clocks& clocks, Access a, uint32_t offset, int bytes) {
    a.atomic = true;
    const Found found = read(clocks, a, offset, bytes);
    if (found) return found;
    return each(a, offset, bytes, [&](Cell& cell, uint32_t at) -> Found {
      if (const Access* other = clash(clocks, cell, a, false)) return Conflict{Wrong::race, *other, at};
      cell.atomics = true;
      return {};
    });
  }
  // An asynchronous copy may write from here on ...
  Found copy_begin(const Clocks& clocks, Access a, uint32_t offset, int bytes) {
    const Found found = write(clocks, a, offset, bytes);
    if (!found) each(a, offset, bytes, [](Cell& cell, uint32_t) { return cell.copying = true, Found{}; });
    return found;
  }
  // ... and wrote for the thread that waited.
  void copy_end(Access a, uint32_t offset, int bytes) {
    each(a, offset, bytes,
         [&](Cell& cell, uint32_t) { return cell.copying = false, cell.write = a, Found{}; });
  }

 private:
  struct Cell {
    Access write;
    uint32_t phase = 0;         // of `since`
    uint8_t valid = 0;          // bytes that were written
    bool copying = false;       // under an asynchronous copy
    bool atomics = false;       // some in `since`
    std::vector<Access> since;  // reads and atomics behind the last write
  };

  template <class Visit>
  Found each(Access& a, uint32_t offset, int bytes, Visit visit) {
    for (uint32_t i = offset / 2; 2 * i < offset + bytes; ++i) {
      a.bytes = static_cast<uint8_t>((2 * i >= offset ? 1 : 0) | (2 * i + 1 < offset + bytes ? 2 : 0));
      Cell& cell = cells_[i];
      if (cell.phase != phase_) {
        cell.since.clear();
        cell.atomics = false;
        cell.phase = phase_;
      }
      if (const Found found = visit(cell, 2 * i)) return found;
    }
    return {};
  }
  static const Access* clash(const Clocks& clocks, const Cell& cell, const Access& a, bool only_atomics) {
    for (const Access& e : cell.since)
      if ((e.bytes & a.bytes) && (e.atomic || !only_atomics) && !(e.atomic && a.atomic) &&
          !clocks.ordered(e, a.thread))
        return &e;
    return nullptr;
  }
  static void remember(const Clocks& clocks, Cell& cell, const Access& a) {
    auto& since = cell.since;
    if (!since.empty() && since.back().thread == a.thread && since.back().clock == a.clock &&
        since.back().bytes == a.bytes && since.back().atomic == a.atomic)
      return;
    if (since.size() >=
        4 * static_cast<size_t>(clocks.threads())) {  // keep the newest of each thread and sort
      const auto same = [](const Access& x, const Access& y) {
        return x.thread == y.thread && x.bytes == y.bytes && x.atomic == y.atomic;
      };
      std::sort(since.begin(), since.end(), [&](const Access& x, const Access& y) {
        if (!same(x, y))
          return (x.thread << 3 | x.bytes << 1 | x.atomic) < (y.thread << 3 | y.bytes << 1 | y.atomic);
        return x.clock > y.clock;
      });
      since.erase(std::unique(since.begin(), since.end(), same), since.end());
    }
    since.push_back(a);
  }

  std::vector<Cell> cells_;
  uint32_t phase_ = 0;
};

}  // namespace simt
