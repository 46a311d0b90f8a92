// SPDX-License-Identifier: Apache-2.0
// The warp-wide matrix instructions as the PTX text states them: which element each lane holds in each register. Lane l is
// g = l / 4, t = l % 4. Sums are taken in double and rounded once, so inputs whose float sums are exact give exact results; a
// tensor core's own rounding is not modelled.
#pragma once

#include <stdint.h>

namespace simt {

struct Fragments {  // one lane's registers
  const uint32_t *a, *b;
  void* d;  // float or int [4]
  uint32_t meta;
};

// Position of element `e` (lowest first) of register `r`; `per` elements a register, 2 (16 bit) or 4 (8 bit).
struct Position {
  int row, column;
};
constexpr Position position_a(int lane, int r, int e, int per) {
  return {lane / 4 + 8 * (r & 1), per * (lane % 4) + e + 4 * per * (r >> 1)};
}
constexpr Position position_b(int lane, int r, int e, int per) {  // row is k, column is n
  return {per * (lane % 4) + e + 4 * per * r, lane / 4};
}
constexpr Position position_d(int lane, int r) { return {lane / 4 + 8 * (r >> 1), 2 * (lane % 4) + (r & 1)}; }

// Nibble p0 | p1 << 2 of `quad` (four dense columns) of `row`. 16 bit, k32: lanes t = 2 selector + s, s the half of the
// columns; rows g and g + 8 share a word. 8 bit, k64: all lanes; lane t has row g + 8 (t & 1), columns 32 (t >> 1) .. +31.
template <class LaneOf>
uint32_t nibble(const LaneOf& lane, int row, int quad, int per, int selector) {
  const int g = row % 8, high = row / 8;
  if (per == 2) return lane(4 * g + 2 * selector + quad / 4).meta >> (16 * high + 4 * (quad % 4)) & 15u;
  return lane(4 * g + high + 2 * (quad / 8)).meta >> (4 * (quad % 8)) & 15u;
}

// D[16, 8] += A B with elements of T, which `value` turns into a number; K dense rows of B; Sparse: A holds K / 2 columns.
// False: an illegal nibble, at (*bad).row and quad (*bad).column.
template <int K, int Per, bool Sparse, class D, class Value, class LaneOf>
bool multiply(const LaneOf& lane, int selector, Value value, Position* bad) {
  using Wide = decltype(value(0u));
  constexpr int kColumns = Sparse ? K / 2 : K, kBits = 32 / Per;
  Wide a[16][kColumns], b[K][8];
  for (int l = 0; l < 32; ++l)
    for (int e = 0; e < Per; ++e) {
      const auto element = [e](uint32_t word) { return word >> (kBits * e) & (0xffffffffu >> (32 - kBits)); };
      for (int r = 0; r < kColumns / (4 * Per) * 2; ++r) {
        const Position p = position_a(l, r, e, Per);
        a[p.row][p.column] = value(element(lane(l).a[r]));
      }
      for (int r = 0; r < K / (4 * Per); ++r) {
        const Position p = position_b(l, r, e, Per);
        b[p.row][p.column] = value(element(lane(l).b[r]));
      }
    }
  Wide sum[16][8] = {};
  for (int i = 0; i < 16; ++i)
    for (int c = 0; c < kColumns; ++c) {
      int k = c;
      if constexpr (Sparse) {
        const uint32_t kept = nibble(lane, i, c / 2, Per, selector);
        if ((kept & 3u) >= kept >> 2) return *bad = {i, c / 2}, false;
        k = c / 2 * 4 + static_cast<int>(c % 2 ? kept >> 2 : kept & 3u);
      }
      for (int j = 0; j < 8; ++j) sum[i][j] += a[i][c] * b[k][j];
    }
  for (int l = 0; l < 32; ++l)
    for (int r = 0; r < 4; ++r) {
      const Position p = position_d(l, r);
      D& d = static_cast<D*>(lane(l).d)[r];
      d = static_cast<D>(static_cast<Wide>(d) + sum[p.row][p.column]);
    }
  return true;
}

}  // namespace simt
