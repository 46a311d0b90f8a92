// SPDX-License-Identifier: Apache-2.0
// The shapes in which the 2:4 GEMM is compiled, as data. Host and device; no CUDA header.
#pragma once

#include "sparse24/layout.h"

namespace lissom::sparse24 {

// A block computes `rows` rows of W times `tokens` rows of x, `records` k steps a stage. Its warps divide rows, tokens and, where
// there is little else to divide, the steps of a stage.
struct Tile {
  int rows, tokens, records;
  int warps_n, warps_m, warps_k;
  int stages;
  int min_blocks;  // resident on an SM of 65536 registers and 164 KiB of shared memory
};

constexpr Tile kTiles[] = {
    // large M: the tensor cores' time hides everything else
    {256, 128, 2, 4, 2, 1, 4, 1},
    {128, 128, 2, 2, 2, 1, 3, 2},
    // more blocks for middling M
    {128, 64, 2, 2, 2, 1, 4, 2},
    {64, 64, 2, 2, 2, 1, 4, 3},
    // small M: W streams through a deep ring
    {64, 32, 4, 2, 1, 4, 4, 2},
    {64, 16, 4, 2, 1, 4, 5, 2},
    {64, 8, 4, 2, 1, 4, 6, 2},
    // small M and small N
    {32, 32, 4, 1, 1, 4, 5, 2},
    {32, 16, 4, 1, 1, 4, 5, 3},
    {32, 8, 4, 1, 1, 4, 6, 3},
};
constexpr int kTileCount = sizeof(kTiles) / sizeof(kTiles[0]);

constexpr int threads(const Tile& t) { return 32 * t.warps_n * t.warps_m * t.warps_k; }

// A stage is the packed records of rows / 32 panels, then `tokens` rows of x.
constexpr int weight_bytes(const Tile& t, int bytes) {
  return t.rows / 32 * t.records * static_cast<int>(sm80::record_bytes(bytes));
}
constexpr int stage_bytes(const Tile& t, int bytes) {
  return weight_bytes(t, bytes) + t.tokens * t.records * static_cast<int>(sm80::kStepBytes);
}
// At the end the sums lie in the same memory, a plane [tokens][rows + 4] for each of warps_k: with the 4, lanes that hold
// different tokens meet different banks. Behind ring and planes: bias and scale of the rows.
constexpr int row_stride(const Tile& t) { return t.rows + 4; }
constexpr int plane_words(const Tile& t) { return t.tokens * row_stride(t); }
constexpr int term_bytes(const Tile& t) { return 2 * 4 * t.rows; }
constexpr int shared_bytes(const Tile& t, int bytes) {
  const int ring = t.stages * stage_bytes(t, bytes), planes = 4 * t.warps_k * plane_words(t);
  return (ring > planes ? ring : planes) + term_bytes(t);
}

constexpr bool well_formed(const Tile& t) {
  const int panels = t.rows / 32, warps = t.warps_n * t.warps_m * t.warps_k;
  return t.rows % (32 * t.warps_n) == 0 && t.tokens % (8 * t.warps_m) == 0 && t.records % t.warps_k == 0 &&
         t.records % 2 == 0 && warps % panels == 0 && threads(t) % (8 * 4 * t.records) == 0 && t.stages >= 3;
}

// GEMV: a block takes one panel; its warps take the records in turn.
constexpr int kGemvWarps = 8;
constexpr int kGemvTokens = 4;
constexpr int gemv_shared_bytes(int tokens) { return 4 * kGemvWarps * 32 * tokens; }

}  // namespace lissom::sparse24
