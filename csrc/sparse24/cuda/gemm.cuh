// SPDX-License-Identifier: Apache-2.0
// y^T = W x^T on sparse tensor cores (mma.sp): rows of W are rows of the instruction, tokens its columns.
//
// A block computes one tile. Stages of a ring in shared memory run ahead of the arithmetic:
//   weights   [panel][record]: the packed records as they lie in memory (layout.h, "sm80-v1"); a lane takes a fragment of W
//             with one 16-byte load
//   x         [token][records * 64 B]: 16-byte chunk c of token r lies at c ^ (r % 8), so that the eight rows of a phase of
//             ldmatrix, and eight copying lanes, meet eight groups of banks
// One barrier a stage. It stands before the last k step of the stage, whose operands are in registers by then, and while those
// are multiplied the first operands of the next stage arrive.
//
// A pruned weight never meets its x: Inf or NaN there does no harm. A filler (a zero kept to make two) does meet it, and
// 0 * Inf is NaN, as in the canonical form on the CPU.
#pragma once

#include "sparse24/cuda/epilogue.cuh"
#include "sparse24/cuda/sync.cuh"
#include "sparse24/cuda/tiles.h"

namespace lissom::sparse24 {

// What differs between the types. `Fragment` (0, 1): the half of a record; `meta`: the lane's metadata words of the record.
template <class T>
struct Element {
  using Sum = float;
  template <int Fragment>
  LISSOM_DEVICE static void multiply(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                     const uint32_t (&meta)[1]) {
    dev::mma_sp_m16n8k32<T, Fragment>(d, a, b, meta[0]);
  }
};
template <>
struct Element<int8_t> {
  using Sum = int;
  template <int Fragment>
  LISSOM_DEVICE static void multiply(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                     const uint32_t (&meta)[2]) {
    dev::mma_sp_m16n8k64(d, a, b, meta[Fragment]);
  }
};

template <class T, int Index>
struct Gemm {
  static constexpr Tile kTile = kTiles[Index];
  static_assert(well_formed(kTile), "see well_formed() in tiles.h");
  using Sum = typename Element<T>::Sum;

  static constexpr int kBytes = sizeof(T);
  static constexpr int kThreads = threads(kTile);
  static constexpr int kStages = kTile.stages;
  static constexpr int kSharedBytes = shared_bytes(kTile, kBytes);
  static constexpr int kStageBytes = stage_bytes(kTile, kBytes);
  static constexpr int kTermsAt = kSharedBytes - term_bytes(kTile);
  static constexpr int kRowStride = row_stride(kTile), kPlaneWords = plane_words(kTile);
  static constexpr int kTilePanels = kTile.rows / 32;
  static constexpr int kRecordBytes = sm80::record_bytes(kBytes);
  static constexpr int kMetaBytes = sm80::meta_bytes(kBytes);
  static constexpr int kMetaWords = kMetaBytes / 128;  // of a lane
  static constexpr int kPanelBytes = kTile.records * kRecordBytes;
  static constexpr int kWeightBytes = weight_bytes(kTile, kBytes);
  static constexpr int kTokenBytes = kTile.records * sm80::kStepBytes;
  // of a warp
  static constexpr int kPanels = kTilePanels / kTile.warps_n;
  static constexpr int kColumns = kTile.tokens / kTile.warps_m / 8;
  static constexpr int kSteps = kTile.records / kTile.warps_k;
  // Records come in twos, so a stage of two never lacks one.
  static constexpr bool kAlwaysFull = kTile.records == 2;
  // Copies: a panel is shared by kPerPanel threads, a row of x by kChunks, and a thread has every kApart-th token.
  static constexpr int kPerPanel = kThreads / kTilePanels;
  static constexpr int kChunks = kTokenBytes / 16, kApart = kThreads / kChunks;

  using Sums = Sum[2 * kPanels][kColumns][4];

  struct Operands {  // of one k step: W, and the first eight tokens
    uint32_t a[2 * kPanels][4], meta[kPanels][kMetaWords], b[4];
  };

  const Work& w;
  int64_t first_panel, first_token;
  int first_stage, stages;                  // of this split
  int whole_stages;                         // from here on something of x is missing
  const uint8_t *weights, *x;               // what this thread copies of stage 0
  int weights_to, x_to;                     // and where to, in a stage
  int warp_n, warp_m, warp_k;               // which part of the tile is this warp's
  int fragment_at, meta_at, x_at, x_chunk;  // where this lane reads in a stage

  LISSOM_DEVICE explicit Gemm(const Work& work) : w(work) {
    // Bands of eight tiles of W, each with all tokens: blocks that run together share W and x in L2.
    constexpr int64_t kBand = 8;
    const int64_t down = (w.panels + kTilePanels - 1) / kTilePanels;
    const int64_t across = (w.p.m + kTile.tokens - 1) / kTile.tokens;
    const int64_t band = dev::block_x() / (kBand * across), inside = dev::block_x() % (kBand * across);
    const int64_t height = down - kBand * band < kBand ? down - kBand * band : kBand;
    first_panel = (kBand * band + inside % height) * kTilePanels;
    first_token = inside / height * kTile.tokens;

    const int64_t all = (w.records + kTile.records - 1) / kTile.records;
    first_stage = static_cast<int>(all * dev::block_y() / w.splits);
    stages = static_cast<int>(all * (dev::block_y() + 1) / w.splits) - first_stage;
    whole_stages = first_token + kTile.tokens <= w.p.m ? static_cast<int>(w.p.k * kBytes / kTokenBytes) : 0;

    const int thread = dev::thread(), panel = thread / kPerPanel, chunk = thread % kPerPanel * 16;
    // Panels beyond the last are read as the last one; their sums are never stored.
    const int64_t last = w.panels - 1, wanted = first_panel + panel;
    weights = static_cast<const uint8_t*>(w.p.records) +
              (wanted < last ? wanted : last) * w.records * kRecordBytes + chunk;
    weights_to = panel * kPanelBytes + chunk;
    const int row = thread / kChunks, piece = thread % kChunks;
    x = static_cast<const uint8_t*>(w.p.x) + (first_token + row) * w.p.x_stride * kBytes + 16 * piece;
    x_to = kWeightBytes + row * kTokenBytes + 16 * (piece ^ (row % 8));

    const int warp = dev::warp(), lane = dev::lane();
    warp_n = warp % kTile.warps_n;
    warp_m = warp / kTile.warps_n % kTile.warps_m;
    warp_k = warp / (kTile.warps_n * kTile.warps_m);
    meta_at = warp_n * kPanels * kPanelBytes + 4 * lane;
    fragment_at = warp_n * kPanels * kPanelBytes + kMetaBytes + 16 * lane;
    x_at = kWeightBytes + (warp_m * kColumns * 8 + lane % 8) * kTokenBytes;
    x_chunk = lane / 8;
  }

  // --- global to shared memory ---

  LISSOM_DEVICE void issue(int stage, int slot) const {
    if (stage < stages) {
      if (first_stage + stage < whole_stages)
        copy<true>(first_stage + stage, slot);
      else
        copy<false>(first_stage + stage, slot);
    }
    dev::cp_async_commit();
  }

  template <bool kWhole>
  LISSOM_DEVICE void copy(int stage, int slot) const {
    const auto weights_in = dev::shared<uint8_t>(slot + weights_to), x_in = dev::shared<uint8_t>(slot + x_to);
    const int64_t done = int64_t{stage} * kPanelBytes, panel_end = w.records * kRecordBytes;
    LISSOM_UNROLL for (int c = 0; c < kPanelBytes; c += 16 * kPerPanel) {
      const int chunk = dev::thread() % kPerPanel * 16 + c;
      if ((kPanelBytes % (16 * kPerPanel) == 0 || chunk < kPanelBytes) &&
          (kWhole || kAlwaysFull || done + chunk < panel_end))
        dev::cp_async<16>(weights_in + c, weights + done + c);
    }
    const int64_t at = int64_t{stage} * kTokenBytes, apart = kApart * w.p.x_stride * kBytes;
    const int row = dev::thread() / kChunks;
    LISSOM_UNROLL for (int i = 0; i * kApart < kTile.tokens; ++i) {
      if (kTile.tokens % kApart != 0 && row + i * kApart >= kTile.tokens) break;
      if constexpr (kWhole) {
        dev::cp_async<16>(x_in + i * kApart * kTokenBytes, x + at + i * apart);
      } else {
        const int64_t left = w.p.k * kBytes - at - 16 * (dev::thread() % kChunks);
        const bool here = left > 0 && first_token + row + i * kApart < w.p.m;
        dev::cp_async<16>(x_in + i * kApart * kTokenBytes, here ? x + at + i * apart : w.p.x,
                          !here       ? 0
                          : left < 16 ? static_cast<int>(left)
                                      : 16);
      }
    }
  }

  // --- shared memory to registers ---

  // Which record of the stage is this warp's in a step.
  LISSOM_DEVICE int record_of(int step) const { return step * kTile.warps_k + warp_k; }
  LISSOM_DEVICE bool has(int stage, int step) const {
    return kAlwaysFull || int64_t{first_stage + stage} * kTile.records + record_of(step) < w.records;
  }

  LISSOM_DEVICE void load_x(uint32_t (&b)[4], int slot, int record, int column) const {
    const int chunk = (4 * record + x_chunk) ^ (dev::lane() % 8);
    dev::ldmatrix<4>(b, dev::shared<uint8_t>(slot + x_at + column * 8 * kTokenBytes + 16 * chunk));
  }

  LISSOM_DEVICE void load_operands(Operands& o, int slot, int record) const {
    const int at = slot + record * kRecordBytes;
    LISSOM_UNROLL for (int i = 0; i < kPanels; ++i) {
      LISSOM_UNROLL for (int j = 0; j < kMetaWords; ++j) o.meta[i][j] =
          dev::shared<uint32_t>(at + meta_at + i * kPanelBytes + 128 * j).load();
      LISSOM_UNROLL for (int f = 0; f < 2; ++f) {
        const auto a =
            dev::shared<dev::Vec<uint32_t, 4>>(at + fragment_at + i * kPanelBytes + 512 * f).load();
        LISSOM_UNROLL for (int r = 0; r < 4; ++r) o.a[2 * i + f][r] = a[r];
      }
    }
    load_x(o.b, slot, record, 0);
  }

  // --- arithmetic ---

  LISSOM_DEVICE void multiply(Sums& sums, const Operands& o, int slot, int record) const {
    uint32_t b[2][4];
    LISSOM_UNROLL for (int r = 0; r < 4; ++r) b[0][r] = o.b[r];
    LISSOM_UNROLL for (int c = 0; c < kColumns; ++c) {
      if (c + 1 < kColumns) load_x(b[(c + 1) % 2], slot, record, c + 1);
      LISSOM_UNROLL for (int i = 0; i < kPanels; ++i) {
        Element<T>::template multiply<0>(sums[2 * i][c], o.a[2 * i], b[c % 2], o.meta[i]);
        Element<T>::template multiply<1>(sums[2 * i + 1][c], o.a[2 * i + 1], b[c % 2], o.meta[i]);
      }
    }
  }

  LISSOM_DEVICE static int after(int slot) {
    return slot == (kStages - 1) * kStageBytes ? 0 : slot + kStageBytes;
  }

  LISSOM_DEVICE void run(Sums& sums) const {
    if (stages == 0) return;
    for (int s = 0; s < kStages - 1; ++s) issue(s, s * kStageBytes);
    LISSOM_WAIT(1, kStages - 2);
    LISSOM_SYNC(2, dev::barrier());
    int slot = 0, free = (kStages - 1) * kStageBytes;
    Operands now, next;
    // Where a warp has no record, it loads the first one, which is there in any stage, and does not use it.
    load_operands(now, slot, has(0, 0) ? record_of(0) : 0);
    for (int stage = 0; stage < stages; ++stage) {
      LISSOM_UNROLL for (int step = 0; step < kSteps; ++step) {
        const bool last = step == kSteps - 1;
        if (last) {
          LISSOM_WAIT(3, kStages - 3);     // the next stage is complete ...
          LISSOM_SYNC(4, dev::barrier());  // ... for all, and all have read the stage before this one
        }
        const int then = last && stage + 1 < stages ? stage + 1 : stage, soon = last ? 0 : step + 1;
        load_operands(next, then == stage ? slot : after(slot), has(then, soon) ? record_of(soon) : 0);
        if (last) {
          issue(stage + kStages - 1, free);
          free = after(free);
        }
        if (has(stage, step)) multiply(sums, now, slot, record_of(step));
        now = next;
      }
      slot = after(slot);
    }
  }

  // --- registers to y, through shared memory: so a thread gets adjacent rows of W, which are adjacent in y ---

  LISSOM_DEVICE void load_terms() const {
    for (int i = dev::thread(); i < kTile.rows; i += kThreads) {
      dev::shared<float>(kTermsAt).store(i, bias_of(w, 32 * first_panel + i));
      if constexpr (kBytes == 1)
        dev::shared<float>(kTermsAt).store(kTile.rows + i, scale_of(w, 32 * first_panel + i));
    }
  }

  LISSOM_DEVICE void store(const Sums& sums) const {
    LISSOM_SYNC(5, dev::barrier());  // the ring has been read, and the terms are there
    const int lane = dev::lane();
    const auto plane = dev::shared<Sum>(4 * warp_k * kPlaneWords);
    LISSOM_UNROLL for (int f = 0; f < 2 * kPanels; ++f) {
      LISSOM_UNROLL for (int c = 0; c < kColumns; ++c) LISSOM_UNROLL for (int r = 0; r < 4; ++r) {
        const int row = (warp_n * 2 * kPanels + f) * 16 + lane / 4 + 8 * (r / 2);
        const int token = (warp_m * kColumns + c) * 8 + lane % 4 * 2 + r % 2;
        plane.store(token * kRowStride + row, sums[f][c][r]);
      }
    }
    LISSOM_SYNC(6, dev::barrier());
    if (w.splits > 1) return store_rows<float, 4, true>();
    if (w.p.out == static_cast<int>(DType::f32)) return store_rows<float, 4>();
    if constexpr (kBytes == 2) return store_rows<T, 8>();
    if (w.p.out == static_cast<int>(DType::bf16)) return store_rows<dev::bf16, 8>();
    store_rows<dev::f16, 8>();
  }

  // A thread takes Count rows of one token; the 32 / Count threads of a panel stand beside each other, and the next token's rows
  // lie four banks further: no conflict.
  template <class Out, int Count, bool kPartial = false>
  LISSOM_DEVICE void store_rows() const {
    constexpr int kPerRow = 32 / Count, kPieces = kTilePanels * kTile.tokens * kPerRow;
    for (int i = dev::thread(); i < kPieces; i += kThreads) {
      const int token = i / kPerRow % kTile.tokens;
      const int row = i / kPerRow / kTile.tokens * 32 + i % kPerRow * Count;
      if (first_token + token >= w.p.m) continue;
      Sum total[Count];
      LISSOM_UNROLL for (int q = 0; q < Count; q += 4) LISSOM_UNROLL for (int k = 0; k < kTile.warps_k; ++k) {
        const int at = k * kPlaneWords + token * kRowStride + row + q;
        const auto piece = dev::shared<dev::Vec<Sum, 4>>(4 * at).load();
        LISSOM_UNROLL for (int j = 0; j < 4; ++j) total[q + j] = k == 0 ? piece[j] : total[q + j] + piece[j];
      }
      if constexpr (kPartial)
        store_partial(token, row, total);
      else
        store_final<Out>(token, row, total);
    }
  }

  LISSOM_DEVICE void store_partial(int token, int row, const Sum (&total)[4]) const {
    const int64_t width = 32 * w.panels, n = 32 * first_panel + row;
    if (n >= width) return;
    Sum* to = static_cast<Sum*>(w.partial) + (dev::block_y() * w.p.m + first_token + token) * width + n;
    const dev::Vec<Sum, 4> piece = {{total[0], total[1], total[2], total[3]}};
    dev::store(reinterpret_cast<dev::Vec<Sum, 4>*>(to), piece);
  }

  template <class Out, int Count>
  LISSOM_DEVICE void store_final(int token, int row, const Sum (&total)[Count]) const {
    const auto bias = dev::shared<float>(kTermsAt) + row, scale = bias + kTile.rows;
    const float token_scale = kBytes == 1 ? token_scale_of(w, first_token + token) : 0.0f;
    float v[Count];
    LISSOM_UNROLL for (int i = 0; i < Count; ++i) v[i] =
        affine(total[i], kBytes == 1 ? token_scale * scale.load(i) : 0.0f, bias.load(i));
    finish<Out>(w, first_token + token, 32 * first_panel + row, v);
  }
};

template <class T, int Index>
LISSOM_KERNEL(threads(kTiles[Index]), kTiles[Index].min_blocks)
sparse24_gemm(const Work work) {
  const Gemm<T, Index> block(work);
  typename Gemm<T, Index>::Sums sums = {};
  block.load_terms();
  block.run(sums);
  block.store(sums);
}

constexpr int kReduceThreads = 128;

// Adds the partial sums of a split GEMM, in the order of the splits; four rows of one token a thread.
template <class Sum>
LISSOM_KERNEL(kReduceThreads, 1)
sparse24_reduce(const Work w) {
  const int64_t per_token = 8 * w.panels, i = int64_t{dev::block_x()} * kReduceThreads + dev::thread();
  if (i >= w.p.m * per_token) return;
  const int64_t token = i / per_token, row = i % per_token * 4;
  const Sum* from = static_cast<const Sum*>(w.partial) + token * 32 * w.panels + row;
  Sum total[4] = {};
  for (int s = 0; s < w.splits; ++s, from += w.p.m * 32 * w.panels) {
    const auto piece = dev::load(reinterpret_cast<const dev::Vec<Sum, 4>*>(from));
    LISSOM_UNROLL for (int j = 0; j < 4; ++j) total[j] += piece[j];
  }
  const float token_scale = token_scale_of(w, token);
  float v[4];
  LISSOM_UNROLL for (int j = 0; j < 4; ++j) v[j] =
      affine(total[j], token_scale * scale_of(w, row + j), bias_of(w, row + j));
  switch (static_cast<DType>(w.p.out)) {
    case DType::f32: return finish<float>(w, token, row, v);
    case DType::bf16: return finish<dev::bf16>(w, token, row, v);
    case DType::f16: return finish<dev::f16>(w, token, row, v);
    case DType::i8: return;  // refused by valid()
  }
}

}  // namespace lissom::sparse24
