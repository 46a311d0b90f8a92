// SPDX-License-Identifier: Apache-2.0
// Canonical form on the device: check, compress, decompress. One warp a row, one lane a quad: memory-bound, run once per
// weight. Values are bit patterns, unsigned integers of the size of an element; see layout.h for the form itself.
#pragma once

#include "core/cuda/dev.cuh"
#include "sparse24/cuda/sync.cuh"
#include "sparse24/layout.h"

namespace lissom::sparse24 {

constexpr int kFormatThreads = 256;
constexpr int kFormatRows = kFormatThreads / 32;  // of a block

// First bad quad of a row: its non-zeros or its nibble in `found`; quad < 0: none.
struct alignas(8) BadInRow {
  int32_t quad, found;
};
// What a check answers: 1 or 0, first bad row and quad (-1: none), and `found` of that quad.
constexpr int kVerdictWords = 4;

template <class T>
using Quad = dev::Vec<T, 4>;
template <class T>
using Pair = dev::Vec<T, 2>;

// Order of magnitudes, zero for both zeros: floats drop the sign bit, so that NaN is largest; int8 has no bit for it.
template <class T>
LISSOM_DEVICE uint32_t magnitude(T bits) {
  if constexpr (sizeof(T) == 1) return bits & 0x80u ? 256u - bits : bits;
  return static_cast<T>(bits << 1);
}

template <class T>
LISSOM_DEVICE uint32_t nonzeros(const Quad<T>& quad) {
  uint32_t mask = 0;
  LISSOM_UNROLL for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(magnitude(quad[i]) != 0) << i;
  return mask;
}

LISSOM_DEVICE int count_of(uint32_t mask) {
  return static_cast<int>((mask & 1u) + (mask >> 1 & 1u) + (mask >> 2 & 1u) + (mask >> 3));
}

// A position is kept if fewer than two others go before it: larger, or as large and lower.
template <class T>
LISSOM_DEVICE uint32_t largest_two(const Quad<T>& quad) {
  uint32_t mask = 0;
  LISSOM_UNROLL for (int i = 0; i < 4; ++i) {
    int before = 0;
    LISSOM_UNROLL for (int j = 0; j < 4; ++j) before +=
        j < i ? magnitude(quad[j]) >= magnitude(quad[i]) : magnitude(quad[j]) > magnitude(quad[i]);
    mask |= static_cast<uint32_t>(before < 2) << i;
  }
  return mask;
}

// Without an index at run time, which would put the quad into local memory.
template <class T>
LISSOM_DEVICE T pick(const Quad<T>& quad, uint32_t position) {
  T v = quad[0];
  LISSOM_UNROLL for (uint32_t i = 1; i < 4; ++i) v = position == i ? quad[i] : v;
  return v;
}

// nibble_of(mask) for every mask, one hexadecimal digit each.
constexpr uint64_t nibble_table() {
  uint64_t table = 0;
  for (uint32_t mask = 0; mask < 16; ++mask) table |= static_cast<uint64_t>(nibble_of(mask)) << (4 * mask);
  return table;
}
constexpr uint64_t kNibbles = nibble_table();

// The whole warp calls this with ascending quads. True in all lanes once a lane is bad; the first such lane has written.
LISSOM_DEVICE bool report_first(bool bad, int64_t quad, uint32_t found, BadInRow* out) {
  const uint32_t votes = dev::ballot(bad);
  if (bad && (votes & ((1u << dev::lane()) - 1)) == 0)
    dev::store(out, BadInRow{static_cast<int32_t>(quad), static_cast<int32_t>(found)});
  return votes != 0;
}

// bad_rows [n]: the first quad of each row with more than two non-zeros.
template <class T>
LISSOM_KERNEL(kFormatThreads, 1)
check_kernel(const T* w, BadInRow* bad_rows, int64_t n, int64_t k) {
  const int64_t row = static_cast<int64_t>(dev::block_x()) * kFormatRows + dev::warp(), quads = k / 4;
  if (row >= n) return;
  for (int64_t first = 0; first < quads; first += 32) {
    const int64_t q = first + dev::lane();
    const uint32_t mask =
        q < quads ? nonzeros(dev::load(reinterpret_cast<const Quad<T>*>(w + row * k) + q)) : 0;
    if (report_first(count_of(mask) > 2, q, count_of(mask), bad_rows + row)) return;
  }
  if (dev::lane() == 0) dev::store(bad_rows + row, BadInRow{-1, 0});
}

// bad_rows [n]: the first illegal nibble of each row, or a nibble behind the last quad that is not 0.
LISSOM_KERNEL(kFormatThreads, 1)
check_meta_kernel(const uint8_t* meta, BadInRow* bad_rows, int64_t n, int64_t k) {
  const int64_t row = static_cast<int64_t>(dev::block_x()) * kFormatRows + dev::warp();
  const int64_t quads = k / 4, columns = meta_columns(k);
  if (row >= n) return;
  for (int64_t first = 0; first < columns; first += 32) {
    const int64_t column = first + dev::lane();
    const bool inside = column < columns;
    const uint32_t both = inside ? dev::load(meta + row * columns + column) : 0;
    const bool low_bad = inside && !legal_nibble(both & 15u);
    const bool high_bad = inside && (2 * column + 1 < quads ? !legal_nibble(both >> 4) : both >> 4 != 0);
    if (report_first(low_bad || high_bad, 2 * column + !low_bad, low_bad ? both & 15u : both >> 4,
                     bad_rows + row))
      return;
  }
  if (dev::lane() == 0) dev::store(bad_rows + row, BadInRow{-1, 0});
}

// The first bad row of all, by one block.
LISSOM_KERNEL(kFormatThreads, 1)
verdict_kernel(const BadInRow* bad_rows, int64_t* verdict, int64_t n) {
  const auto of_warps = dev::shared<int>(0);
  const int none = 0x7fffffff;
  int first = none;
  for (int64_t row = dev::thread(); row < n && first == none; row += kFormatThreads)
    if (dev::load(bad_rows + row).quad >= 0) first = static_cast<int>(row);
  first = dev::reduce_min(first);
  if (dev::lane() == 0) of_warps.store(dev::warp(), first);
  LISSOM_SYNC(1, dev::barrier());
  if (dev::thread() != 0) return;
  for (int w = 1; w < kFormatRows; ++w) first = of_warps.load(w) < first ? of_warps.load(w) : first;
  const BadInRow bad = first == none ? BadInRow{-1, 0} : dev::load(bad_rows + first);
  dev::store(verdict, static_cast<int64_t>(first == none));
  dev::store(verdict + 1, static_cast<int64_t>(first == none ? -1 : first));
  dev::store(verdict + 2, static_cast<int64_t>(bad.quad));
  dev::store(verdict + 3, static_cast<int64_t>(bad.found));
}
constexpr int kVerdictShared = kFormatRows * sizeof(int);

// KeepLargest: two of the largest magnitude; otherwise w has been checked.
template <class T, bool KeepLargest>
LISSOM_KERNEL(kFormatThreads, 1)
compress_kernel(const T* w, T* values, uint8_t* meta, int64_t n, int64_t k) {
  const int64_t row = static_cast<int64_t>(dev::block_x()) * kFormatRows + dev::warp(), quads = k / 4;
  if (row >= n) return;
  for (int64_t first = 0; first < quads; first += 32) {
    const int64_t q = first + dev::lane();
    const bool inside = q < quads;
    const Quad<T> quad =
        inside ? dev::load(reinterpret_cast<const Quad<T>*>(w + row * k) + q) : Quad<T>{{0, 0, 0, 0}};
    uint32_t mask = nonzeros(quad);
    if (KeepLargest && count_of(mask) > 2) mask = largest_two(quad);
    const uint32_t nibble = inside ? static_cast<uint32_t>(kNibbles >> (4 * mask)) & 15u : 0;
    if (inside) {
      Pair<T> kept{{pick(quad, nibble & 3u), pick(quad, nibble >> 2)}};
      LISSOM_UNROLL for (int s = 0; s < 2; ++s) kept[s] = magnitude(kept[s]) ? kept[s] : T{0};
      dev::store(reinterpret_cast<Pair<T>*>(values + row * (k / 2)) + q, kept);
    }
    const uint32_t next = dev::shuffle_down(nibble, 1);
    if (inside && dev::lane() % 2 == 0)
      dev::store(meta + row * meta_columns(k) + q / 2, static_cast<uint8_t>(nibble | next << 4));
  }
}

// The metadata has been checked.
template <class T>
LISSOM_KERNEL(kFormatThreads, 1)
decompress_kernel(const T* values, const uint8_t* meta, T* w, int64_t n, int64_t k) {
  const int64_t row = static_cast<int64_t>(dev::block_x()) * kFormatRows + dev::warp(), quads = k / 4;
  if (row >= n) return;
  for (int64_t q = dev::lane(); q < quads; q += 32) {
    const uint32_t nibble = dev::load(meta + row * meta_columns(k) + q / 2) >> (4 * (q % 2)) & 15u;
    const auto kept = dev::load(reinterpret_cast<const Pair<T>*>(values + row * (k / 2)) + q);
    Quad<T> quad;
    LISSOM_UNROLL for (uint32_t i = 0; i < 4; ++i) quad[i] = nibble >> 2 == i     ? kept[1]
                                                             : (nibble & 3u) == i ? kept[0]
                                                                                  : T{0};
    dev::store(reinterpret_cast<Quad<T>*>(w + row * k) + q, quad);
  }
}

// values = the kept entries of a dense matrix; metadata of any content stays in bounds.
template <class T>
LISSOM_KERNEL(kFormatThreads, 1)
gather_kernel(const T* dense, const uint8_t* meta, T* values, int64_t n, int64_t k) {
  const int64_t row = static_cast<int64_t>(dev::block_x()) * kFormatRows + dev::warp(), quads = k / 4;
  if (row >= n) return;
  for (int64_t q = dev::lane(); q < quads; q += 32) {
    const uint32_t nibble = dev::load(meta + row * meta_columns(k) + q / 2) >> (4 * (q % 2)) & 15u;
    const auto quad = dev::load(reinterpret_cast<const Quad<T>*>(dense + row * k) + q);
    dev::store(reinterpret_cast<Pair<T>*>(values + row * (k / 2)) + q,
               Pair<T>{{pick(quad, nibble & 3u), pick(quad, nibble >> 2)}});
  }
}

}  // namespace lissom::sparse24
