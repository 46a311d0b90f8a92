// SPDX-License-Identifier: Apache-2.0
// What the two dense products of the backward pass share: tiles of 16-bit elements in shared memory and the loop over
// fragments. Each warp owns 16 * FragmentsA rows by 32 columns of the result.
//
// Tiles are cut into chunks of 8 elements (16 bytes). A chunk's place within its row is permuted by the row, so that the eight
// chunks of a phase of ldmatrix, and of eight copying lanes, lie in eight different groups of banks. In a wide tile that also
// holds for the same two chunks of four rows, which 16 lanes fill with 8 bytes each.
#pragma once

#include "core/cuda/dev.cuh"
#include "sparse24/cuda/sync.cuh"

namespace lissom::sparse24::dense {

using Tile = dev::Shared<uint16_t>;

// Offset in elements of a chunk in a tile with rows of 128 elements.
struct Wide {
  static constexpr int kChunks = 16;
  LISSOM_DEVICE static int at(int row, int chunk) {
    return 128 * row + 8 * (chunk ^ ((row & 3) << 1 | (row >> 2 & 1)));
  }
};
// The same with rows of 32 elements.
struct Narrow {
  static constexpr int kChunks = 4;
  LISSOM_DEVICE static int at(int row, int chunk) { return 32 * row + 8 * (chunk ^ (row >> 1 & 3)); }
};

// Row-major in global memory; base and row stride are multiples of 16 bytes.
struct Matrix {
  const uint16_t* data;
  int64_t rows, columns, stride;
};

// Starts the copy of rows [row, row + Rows) from column `column` on; what lies outside of the matrix becomes zero.
template <class Place, int Rows, int Threads>
LISSOM_DEVICE void copy_tile(Tile tile, const Matrix& m, int64_t row, int64_t column) {
  static_assert(Rows * Place::kChunks % Threads == 0, "every thread copies as many chunks");
  LISSOM_UNROLL for (int i = 0; i < Rows * Place::kChunks / Threads; ++i) {
    const int at = dev::thread() + i * Threads, r = at / Place::kChunks, c = at % Place::kChunks;
    const int64_t from = row + r, left = m.columns - column - 8 * c;
    const int bytes = from >= m.rows || left <= 0 ? 0 : left < 8 ? static_cast<int>(left) * 2 : 16;
    dev::cp_async<16>(tile + Place::at(r, c), bytes ? m.data + from * m.stride + column + 8 * c : m.data,
                      bytes);
  }
}

// Fragments of 16 x 16 elements: A as it lies in a narrow tile [rows][k], A from a wide tile [k][rows], and two B (16 x 8 each)
// from a wide tile [k][columns].
LISSOM_DEVICE void load_a(uint32_t (&a)[4], Tile tile, int row, int k) {
  const int l = dev::lane();
  dev::ldmatrix<4>(a, tile + Narrow::at(row + l % 16, k / 8 + l / 16));
}
LISSOM_DEVICE void load_a_transposed(uint32_t (&a)[4], Tile tile, int row, int k) {
  const int l = dev::lane();
  dev::ldmatrix<4, true>(a, tile + Wide::at(k + l % 8 + 8 * (l / 16), row / 8 + (l / 8) % 2));
}
LISSOM_DEVICE void load_b(uint32_t (&b)[2][2], Tile tile, int column, int k) {
  const int l = dev::lane();
  uint32_t r[4];
  dev::ldmatrix<4, true>(r, tile + Wide::at(k + l % 16, column / 8 + l / 16));
  LISSOM_UNROLL for (int i = 0; i < 4; ++i) b[i / 2][i % 2] = r[i];
}

// sums += A B over the 32 steps of k that a stage holds.
template <class T, int FragmentsA, bool Transposed>
LISSOM_DEVICE void multiply_stage(float (&sums)[FragmentsA][4][4], Tile a_tile, Tile b_tile, int row,
                                  int column) {
  LISSOM_UNROLL for (int k = 0; k < 32; k += 16) {
    uint32_t b[2][2][2];
    LISSOM_UNROLL for (int j = 0; j < 2; ++j) load_b(b[j], b_tile, column + 16 * j, k);
    LISSOM_UNROLL for (int i = 0; i < FragmentsA; ++i) {
      uint32_t a[4];
      if constexpr (Transposed)
        load_a_transposed(a, a_tile, row + 16 * i, k);
      else
        load_a(a, a_tile, row + 16 * i, k);
      LISSOM_UNROLL for (int j = 0; j < 4; ++j) dev::mma_m16n8k16<T>(sums[i][j], a, b[j / 2][j % 2]);
    }
  }
}

struct TileIndex {
  int64_t row, column;
};
// Which tile a block takes: bands of 8 rows of tiles, downwards first, so that the blocks that run at one time share both
// operands in L2.
LISSOM_DEVICE TileIndex tile_of(int64_t block, int64_t rows, int64_t columns) {
  constexpr int64_t kBand = 8;
  const int64_t band = block / (kBand * columns), inside = block % (kBand * columns);
  const int64_t height = rows - kBand * band < kBand ? rows - kBand * band : kBand;
  return {kBand * band + inside % height, inside / height};
}

}  // namespace lissom::sparse24::dense
