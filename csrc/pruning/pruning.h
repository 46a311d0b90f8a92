// SPDX-License-Identifier: Apache-2.0
// What the host side may call: raw pointers and sizes. Torch-free.
#pragma once

#include <stdint.h>

#include "core/cpu_isa.h"

namespace lissom::pruning {

// Levels lie in blocks of rows; inside a block each column is contiguous, so that lanes run over rows:
//
//   block 0: column 0 [stride] | column 1 [stride] | ...    block 1: column 0 [stride] | ...
//
// Rows are filled up to whole steps with zeros, which add nothing to any sum here.
constexpr int64_t kRowStep = 64;       // rows that a kernel takes at once
constexpr int64_t kMostStride = 2048;  // rows of a block: a tile of columns stays in L1, its sums below 2^32
constexpr int64_t kTileColumns = 4;    // columns that `distances` takes at once
constexpr int64_t kMostGroup = 64;

struct Kernels {
  // One group of `group` columns, `rows` rows of a block, of which each row keeps the `kept` largest levels.
  // thresholds[c][r]: the kept-th largest level of row r among the other columns of the group: what a column in the place
  // of c must exceed to be kept. Returns the sum of what is pruned.
  uint64_t (*thresholds)(const uint8_t* levels, uint8_t* thresholds, int64_t rows, int64_t stride,
                         int64_t group, int64_t kept);
  // d[i][j] += sum over the rows of |thresholds[i][r] - levels[j][r]|, i < group, j < columns <= kTileColumns.
  void (*distances)(const uint8_t* thresholds, int64_t group, const uint8_t* levels, int64_t columns,
                    int64_t rows, int64_t stride, uint32_t* d, int64_t row_of_d);
};
const Kernels& kernels(CpuIsa isa);

}  // namespace lissom::pruning
