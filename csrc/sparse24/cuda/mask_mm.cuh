// SPDX-License-Identifier: Apache-2.0
// dvalues [N, K/2] = (dy^T x) at the kept positions: dense tiles of 128 rows of W by 128 columns, summed over tokens in float32;
// of each quad only the two kept sums are stored.
#pragma once

#include "sparse24/cuda/dense.cuh"
#include "sparse24/layout.h"

namespace lissom::sparse24 {

struct MaskMm {
  static constexpr int kRows = 128, kColumns = 128, kTokens = 32, kStages = 4, kWarpsDown = 2, kWarps = 8;
  static constexpr int kThreads = 32 * kWarps;
  static constexpr int kTile = kTokens * 128;           // elements of one operand in one stage
  static constexpr int kStageBytes = 2 * kTile * 2;     // dy | x
  static constexpr int kRing = kStages * kStageBytes;   // the results take its place
  static constexpr int kMetaBytesOfRow = kColumns / 8;  // metadata of the tile, behind the ring
  static constexpr int kSharedBytes = kRing + kRows * kMetaBytesOfRow;
  static_assert(kRows * kColumns / 2 * 2 <= kRing, "the ring holds the results");
};

// Kept sum of this lane: even lanes hold columns 0, 1 of a quad and give the first kept one, odd lanes hold 2, 3 and give the
// second. An illegal nibble gives NaN.
LISSOM_DEVICE float kept_sum(float low, float high, uint32_t nibble) {
  const bool odd = dev::lane() % 2;
  const float other = dev::shuffle_xor(odd ? low : high, 1);
  const uint32_t first = nibble & 3u, second = nibble >> 2;
  if (!legal_nibble(nibble)) return dev::bits_float(0x7fffffffu);
  // first in {0, 1, 2}; second in {1, 2, 3}
  if (odd) return second == 1 ? other : second == 2 ? low : high;
  return first == 0 ? low : first == 1 ? high : other;
}

// Rows of 64 kept values, swizzled by chunks of 8 as the tiles are.
LISSOM_DEVICE int kept_at(int row, int kept) { return 64 * row + ((kept / 8 ^ (row & 7)) * 8) + kept % 8; }

// dy [tokens, N], x [tokens, K].
template <class T>
LISSOM_KERNEL(MaskMm::kThreads, 2)
mask_mm_kernel(dense::Matrix dy, dense::Matrix x, const uint8_t* meta, uint16_t* values) {
  using S = MaskMm;
  const auto ring = dev::shared<uint16_t>(0);
  const auto meta_tile = dev::shared<uint8_t>(S::kRing);
  const int64_t n = dy.columns, k = x.columns;
  const auto tile =
      dense::tile_of(dev::block_x(), (n + S::kRows - 1) / S::kRows, (k + S::kColumns - 1) / S::kColumns);
  const int64_t row0 = tile.row * S::kRows, column0 = tile.column * S::kColumns;
  const int64_t steps = (dy.rows + S::kTokens - 1) / S::kTokens;

  const auto copy_stage = [&](int64_t step) {
    if (step < steps) {
      const auto stage = ring + static_cast<int>(step % S::kStages) * 2 * S::kTile;
      dense::copy_tile<dense::Wide, S::kTokens, S::kThreads>(stage, dy, step * S::kTokens, row0);
      dense::copy_tile<dense::Wide, S::kTokens, S::kThreads>(stage + S::kTile, x, step * S::kTokens, column0);
    }
    dev::cp_async_commit();  // empty behind the last step, so that the last waits are for all that was copied
  };

  for (int i = dev::thread(); i < S::kRows * S::kMetaBytesOfRow; i += S::kThreads) {
    const int64_t row = row0 + i / S::kMetaBytesOfRow, byte = column0 / 8 + i % S::kMetaBytesOfRow;
    const bool inside = row < n && byte < meta_columns(k);
    meta_tile.store(i, inside ? dev::load(meta + row * meta_columns(k) + byte) : uint8_t{0});
  }
  float sums[4][4][4] = {};
  const int row = 64 * (dev::warp() % S::kWarpsDown), column = 32 * (dev::warp() / S::kWarpsDown);
  for (int step = 0; step < S::kStages - 1; ++step) copy_stage(step);
  for (int64_t step = 0; step < steps; ++step) {
    LISSOM_WAIT(1, S::kStages - 2);
    LISSOM_SYNC(2, dev::barrier());  // this stage has come for all; all have read the one that is filled next
    copy_stage(step + S::kStages - 1);
    const auto stage = ring + static_cast<int>(step % S::kStages) * 2 * S::kTile;
    dense::multiply_stage<T, 4, true>(sums, stage, stage + S::kTile, row, column);
  }
  LISSOM_SYNC(3, dev::barrier());  // the ring is free, the metadata is there

  const int g = dev::lane() / 4, t = dev::lane() % 4;
  LISSOM_UNROLL for (int i = 0; i < 4; ++i) {
    LISSOM_UNROLL for (int j = 0; j < 4; ++j) {
      LISSOM_UNROLL for (int half = 0; half < 2; ++half) {
        const int r = row + 16 * i + 8 * half + g, quad = column / 4 + 2 * j + t / 2;
        const uint32_t nibble = meta_tile.load(r * S::kMetaBytesOfRow + quad / 2) >> (4 * (quad % 2)) & 15u;
        const float sum = kept_sum(sums[i][j][2 * half], sums[i][j][2 * half + 1], nibble);
        ring.store(kept_at(r, 2 * quad + t % 2), dev::from_float<T>(sum).bits);
      }
    }
  }
  LISSOM_SYNC(4, dev::barrier());
  // Pairs: rows of values are aligned to no more.
  for (int i = dev::thread(); i < S::kRows * S::kColumns / 4; i += S::kThreads) {
    const int r = i / (S::kColumns / 4), quad = i % (S::kColumns / 4);
    if (row0 + r >= n || column0 + 4 * quad >= k) continue;
    const auto pair = (ring + kept_at(r, 2 * quad)).as<uint32_t>().load();
    dev::store(reinterpret_cast<uint32_t*>(values + (row0 + r) * (k / 2) + column0 / 2) + quad, pair);
  }
}

}  // namespace lissom::sparse24
