// SPDX-License-Identifier: Apache-2.0
// dx [M, K] = dy [M, N] W from the packed form: W is not 2:4 along N, so its records are expanded into dense tiles in shared
// memory on the way, one panel (32 rows) a step, and multiplied at dense speed with sums in float32.
#pragma once

#include "sparse24/cuda/dense.cuh"
#include "sparse24/layout.h"

namespace lissom::sparse24 {

// A block makes Rows tokens by 128 columns; its 8 warps lie 2 down and 4 across.
template <int Rows>
struct GradInput {
  static constexpr int kRows = Rows, kColumns = 128, kPanel = sm80::kPanelRows, kStages = 4, kWarps = 8;
  static constexpr int kThreads = 32 * kWarps, kWarpRows = kRows / 2;
  static constexpr int kStage = kRows * kPanel;  // elements of dy
  static constexpr int kDense =
      kPanel * kColumns;  // elements of an expanded tile of W; two of them behind the ring
  static constexpr int kSharedBytes = (kStages * kStage + 2 * kDense) * 2;
  static_assert(kRows * kColumns <= kStages * kStage, "the ring holds the results");
};

// What a lane takes of a panel: warp w one fragment (16 rows) of record w / 2 of the block's four.
struct FragmentPart {
  dev::Vec<uint32_t, 4> values;
  dev::Vec<uint32_t, 2> meta;  // of quads 0-3 and 4-7 of the record; rows g and g + 8 in the halves
};

LISSOM_DEVICE FragmentPart load_part(const unsigned char* records, int64_t first_record, int64_t k,
                                     int64_t panel) {
  const int64_t count = sm80::records(k, 2), record = first_record + dev::warp() / 2;
  if (record >= count) return {};
  const unsigned char* at = records + (panel * count + record) * sm80::record_bytes(2);
  const int lane = dev::lane(), fragment = dev::warp() % 2;
  return {dev::load_stream(reinterpret_cast<const dev::Vec<uint32_t, 4>*>(at + sm80::meta_bytes(2) +
                                                                          fragment * sm80::kFragmentBytes) +
                           lane),
          dev::load(reinterpret_cast<const dev::Vec<uint32_t, 2>*>(at) + 2 * (lane / 4) + fragment)};
}

// The four elements of a quad from the pair that it keeps.
LISSOM_DEVICE dev::Vec<uint32_t, 2> expand(uint32_t pair, uint32_t nibble) {
  const uint64_t quad = static_cast<uint64_t>(pair & 0xffffu) << (16 * (nibble & 3u)) |
                        static_cast<uint64_t>(pair >> 16) << (16 * (nibble >> 2));
  return {{static_cast<uint32_t>(quad), static_cast<uint32_t>(quad >> 32)}};
}

LISSOM_DEVICE void store_part(const FragmentPart& part, dense::Tile tile) {
  const int g = dev::lane() / 4, t = dev::lane() % 4, record = dev::warp() / 2, fragment = dev::warp() % 2;
  LISSOM_UNROLL for (int r = 0; r < 4; ++r) {
    const int row = 16 * fragment + 8 * (r % 2) + g, quad = t + 4 * (r / 2);
    const uint32_t nibble = part.meta[r / 2] >> (16 * (r % 2) + 4 * t) & 15u;
    (tile + dense::Wide::at(row, 4 * record + quad / 2) + 4 * (quad % 2))
        .as<dev::Vec<uint32_t, 2>>()
        .store(0, expand(part.values[r], nibble));
  }
}

// dy [M, N]; `records` behind the header of sm80-v1.
template <class T, int Rows>
LISSOM_KERNEL(GradInput<Rows>::kThreads, 2)
grad_input_kernel(dense::Matrix dy, const unsigned char* records, uint16_t* dx, int64_t k) {
  using S = GradInput<Rows>;
  const auto ring = dev::shared<uint16_t>(0);
  const auto expanded = ring + S::kStages * S::kStage;
  const auto tile = dense::tile_of(dev::block_x(), (dy.rows + S::kRows - 1) / S::kRows,
                                   (k + S::kColumns - 1) / S::kColumns);
  const int64_t row0 = tile.row * S::kRows, column0 = tile.column * S::kColumns;
  const int64_t steps = sm80::panels(dy.columns);

  const auto copy_stage = [&](int64_t step) {
    if (step < steps)
      dense::copy_tile<dense::Narrow, S::kRows, S::kThreads>(
          ring + static_cast<int>(step % S::kStages) * S::kStage, dy, row0, step * S::kPanel);
    dev::cp_async_commit();  // empty behind the last step, so that the last waits are for all that was copied
  };
  // Parts come one step ahead of the expansion and two ahead of their use.
  const auto part_of = [&](int64_t step) {
    return step < steps ? load_part(records, column0 / sm80::record_columns(2), k, step) : FragmentPart{};
  };

  FragmentPart part = part_of(0);
  for (int step = 0; step < S::kStages - 1; ++step) copy_stage(step);
  store_part(part, expanded);
  part = part_of(1);
  float sums[S::kWarpRows / 16][4][4] = {};
  const int row = S::kWarpRows * (dev::warp() % 2), column = 32 * (dev::warp() / 2);
  for (int64_t step = 0; step < steps; ++step) {
    LISSOM_WAIT(1, S::kStages - 2);
    LISSOM_SYNC(2, dev::barrier());  // dy and W of this step are there; nobody reads those of the last one
    copy_stage(step + S::kStages - 1);
    store_part(part, expanded + static_cast<int>((step + 1) % 2) * S::kDense);
    part = part_of(step + 2);
    dense::multiply_stage<T, S::kWarpRows / 16, false>(
        sums, ring + static_cast<int>(step % S::kStages) * S::kStage,
        expanded + static_cast<int>(step % 2) * S::kDense, row, column);
  }
  LISSOM_SYNC(3, dev::barrier());  // the ring is free

  const int g = dev::lane() / 4, t = dev::lane() % 4;
  LISSOM_UNROLL for (int i = 0; i < S::kWarpRows / 16; ++i) {
    LISSOM_UNROLL for (int j = 0; j < 4; ++j) {
      LISSOM_UNROLL for (int half = 0; half < 2;
                         ++half)(ring + dense::Wide::at(row + 16 * i + 8 * half + g, column / 8 + j) + 2 * t)
          .template as<uint32_t>()
          .store(0, dev::pack<T>(sums[i][j][2 * half], sums[i][j][2 * half + 1]));
    }
  }
  LISSOM_SYNC(4, dev::barrier());
  // Fours: rows of dx are aligned to no more.
  using Four = dev::Vec<uint16_t, 4>;
  for (int i = dev::thread(); i < S::kRows * S::kColumns / 4; i += S::kThreads) {
    const int r = i / (S::kColumns / 4), four = i % (S::kColumns / 4);
    if (row0 + r >= dy.rows || column0 + 4 * four >= k) continue;
    const auto values = (ring + dense::Wide::at(r, four / 2) + 4 * (four % 2)).template as<Four>().load();
    dev::store(reinterpret_cast<Four*>(dx + (row0 + r) * k + column0) + four, values);
  }
}

}  // namespace lissom::sparse24
