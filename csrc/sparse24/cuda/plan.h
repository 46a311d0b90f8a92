// SPDX-License-Identifier: Apache-2.0
// Which tile, and in how many parts of k: the performance model of docs/notes/cuda.md over the table in tiles.h. Host only, plain
// arithmetic, tested on paper. Nothing here was measured.
#pragma once

#include <algorithm>
#include <cmath>

#include "sparse24/cuda/tiles.h"

namespace lissom::sparse24 {

// What limits a GPU. Rates are data-sheet values; `latency` is that of memory under load.
struct Gpu {
  int sms, shared_per_block, shared_per_sm;
  double clock;       // Hz
  double memory, l2;  // bytes a second
  double l2_bytes;
  double mma_cycles;  // of a quarter of an SM, for one sparse instruction
  double latency, launch;
  double dense;  // operations a second of its dense bf16 peak
};

constexpr Gpu kA100 = {108, 163 << 10, 164 << 10, 1.41e9, 2.04e12, 5.1e12, 40e6, 8, 700e-9, 2e-6, 312e12};
constexpr Gpu kH100 = {132, 227 << 10, 228 << 10, 1.83e9, 3.35e12, 7.5e12, 50e6, 6.7, 700e-9, 2e-6, 989e12};
constexpr Gpu kB200 = {148, 227 << 10, 228 << 10, 1.85e9, 8.0e12, 12e12, 126e6, 6.7, 800e-9, 2e-6, 2250e12};
constexpr Gpu kRtx50 = {170, 99 << 10, 100 << 10, 2.4e9, 1.79e12, 6e12, 96e6, 16, 600e-9, 2e-6, 209e12};

constexpr struct {
  const char* name;
  const Gpu* gpu;
} kGpus[] = {{"a100", &kA100}, {"h100", &kH100}, {"b200", &kB200}, {"rtx50", &kRtx50}};

// The nearest of the four, with the parts that the device at hand has; memory and L2 shrink with its SMs.
inline Gpu gpu_of(int capability, int sms, int shared_per_block, int shared_per_sm) {
  Gpu g = shared_per_sm < kA100.shared_per_sm ? kRtx50
          : capability < 90                   ? kA100
          : capability < 100                  ? kH100
                                              : kB200;
  const double share = std::min(1.0, static_cast<double>(sms) / g.sms);
  g.memory *= share, g.l2 *= share, g.dense *= share;
  g.sms = sms, g.shared_per_block = shared_per_block, g.shared_per_sm = shared_per_sm;
  return g;
}

struct Size {
  int64_t m, n, k;
  int bytes;  // of an element
};

struct Plan {
  int tile, splits;  // tile < 0: gemv
};

// Seconds. `total` is launch + the largest of the three + what no overlap hides.
struct Prediction {
  double memory, l2, sm, exposed, total;
  double bytes;  // that cross the bus of the memory
  // For choosing: overlap is never perfect, so of equal plans the one that does less is better.
  double score() const { return total + 0.1 * (memory + l2 + sm - std::max({memory, l2, sm})); }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// What a block does in one stage whose records are all there: instructions of tensor cores, wavefronts of shared memory.
struct StageCounts {
  double matrix, wavefronts;
};
// A fragment takes 4 wavefronts, a word of metadata 1, eight tokens 4; every copied byte is written once.
inline double operand_wavefronts(
    const Tile& t, int bytes) {  // of a warp and step, but for all tokens beyond the first eight
  return t.rows / 32.0 / t.warps_n * (8 + 2.0 / bytes) + 4;
}
inline StageCounts stage_counts(const Tile& t, int bytes) {
  const double warps = threads(t) / 32.0, steps = static_cast<double>(t.records) / t.warps_k;
  const double columns = t.tokens / 8.0 / t.warps_m;  // of a warp
  return {t.records * (t.rows / 16.0) * (t.tokens / 8.0),
          stage_bytes(t, bytes) / 128.0 + warps * steps * (operand_wavefronts(t, bytes) + 4 * (columns - 1))};
}

// Cycles of an SM that one stage of a tile keeps its busiest part busy.
struct StageCycles {
  double matrix, shared, issue;
  double most() const { return std::max({matrix, shared, issue}); }
};
inline StageCycles stage_cycles(const Tile& t, int bytes, const Gpu& g) {
  const double panels = t.rows / 32.0 / t.warps_n, columns = t.tokens / 8.0 / t.warps_m;  // of a warp
  const double warps = threads(t) / 32.0, steps = static_cast<double>(t.records) / t.warps_k;
  const double words = 2.0 / bytes;  // of metadata, for a record
  const double instructions = 2 * panels * columns;
  StageCycles c;
  c.matrix = stage_counts(t, bytes).matrix * g.mma_cycles / 4;
  c.shared = stage_counts(t, bytes).wavefronts;
  // Counted in SASS: about 75 instructions of a stage beside those of its steps, copies among them.
  c.issue = warps * (steps * (instructions + panels * (2 + words) + columns + 4) + 75) / 4;
  return c;
}

inline int resident_blocks(const Tile& t, int bytes, const Gpu& g) {
  const int shared = shared_bytes(t, bytes);
  return shared > g.shared_per_block ? 0 : std::min(t.min_blocks, g.shared_per_sm / (shared + 1024));
}

// Bytes that must cross the bus, whatever the kernel: W, x and y once.
inline double least_bytes(const Size& s) {
  return static_cast<double>(sm80::packed_bytes(s.n, s.k, s.bytes)) + 1.0 * s.m * s.k * s.bytes +
         2.0 * s.m * s.n;
}
// The tighter of two bounds: those bytes at full bandwidth, or the multiplications at full rate.
inline double bound(const Size& s, const Gpu& g) {
  const double instructions =
      ceil_div(s.n, 16) * ceil_div(s.m, 8) * 1.0 * ceil_div(s.k, sm80::record_columns(s.bytes));
  return std::max(least_bytes(s) / g.memory, instructions * g.mma_cycles / (4 * g.sms * g.clock));
}

inline Prediction predict(const Size& s, const Tile& t, int splits, const Gpu& g) {
  const int64_t down = ceil_div(32 * sm80::panels(s.n), t.rows), across = ceil_div(s.m, t.tokens);
  const int64_t blocks = down * across * splits;
  const int64_t stages = ceil_div(ceil_div(sm80::records(s.k, s.bytes), t.records), splits);
  const int resident = resident_blocks(t, s.bytes, g);
  const int64_t at_once = std::min<int64_t>(blocks, int64_t{g.sms} * resident);
  const double block_bytes = static_cast<double>(stages) * stage_bytes(t, s.bytes);

  // Blocks that run together cover a band of tiles; what they share is read once if L2 holds the operands, else once a wave.
  const double waves = static_cast<double>(ceil_div(blocks, at_once)),
               rows_of_tiles = std::min<double>(8, down);
  const double w_tile = 1.0 * stages * weight_bytes(t, s.bytes), x_tile = block_bytes - w_tile;
  const double of_wave = rows_of_tiles * w_tile + std::ceil(at_once / rows_of_tiles) * x_tile;
  double bytes = least_bytes(s);
  if (bytes > 0.8 * g.l2_bytes && across > 1) bytes = std::max(bytes, waves * of_wave + 2.0 * s.m * s.n);

  // Memory runs at full speed only while enough bytes are under way (Little).
  const double under_way = 1.0 * at_once * std::min<int64_t>(t.stages - 2, stages) * stage_bytes(t, s.bytes);
  Prediction p;
  p.bytes = bytes;
  p.memory = bytes / std::min(0.92 * g.memory, under_way / g.latency);
  const double partial = splits > 1 ? 8.0 * splits * s.m * s.n : 0;  // written, read again
  p.l2 = (blocks * block_bytes + 2.0 * s.m * s.n + partial) / g.l2;
  p.sm = ceil_div(blocks, g.sms) * stages * stage_cycles(t, s.bytes, g).most() / g.clock;
  // The first stage arrives, and at the end the sums pass through shared memory twice and leave; 32 bytes a cycle.
  const double epilogue = t.warps_k * plane_words(t) * 8 / 128.0 + t.rows * t.tokens * 2 / 32.0 + 500;
  p.exposed = g.latency + waves * epilogue / g.clock + (splits > 1 ? g.launch + g.latency : 0);
  p.total = g.launch + p.exposed + std::max({p.memory, p.l2, p.sm});
  return p;
}

inline Prediction predict_gemv(const Size& s, const Gpu& g) {
  constexpr double kInstructions[] = {0, 144, 193, 301, 301};  // of a warp and record, counted in SASS
  const double panels = static_cast<double>(sm80::panels(s.n)),
               records = panels * sm80::records(s.k, s.bytes);
  const double ahead = s.m > 2 ? 2 : 4;
  const double at_once = std::min(panels, 2.0 * g.sms);
  const double under_way = at_once * kGemvWarps * ahead * sm80::record_bytes(s.bytes);
  Prediction p;
  p.bytes = least_bytes(s);
  p.memory = p.bytes / std::min(0.92 * g.memory, under_way / g.latency);
  p.l2 = (p.bytes + panels * s.m * s.k * s.bytes) / g.l2;
  p.sm = std::ceil(panels / g.sms) * g.sms / panels * records * kInstructions[s.m] / (4 * g.sms * g.clock);
  p.exposed = g.latency + 500 / g.clock;
  p.total = g.launch + p.exposed + std::max({p.memory, p.l2, p.sm});
  return p;
}

inline Prediction predict(const Size& s, const Plan& plan, const Gpu& g) {
  return plan.tile < 0 ? predict_gemv(s, g) : predict(s, kTiles[plan.tile], plan.splits, g);
}

// What a launch does, in the words of the executor's counters, with which a test compares them.
struct Counts {
  int64_t blocks, waves;
  double matrix;      // instructions of tensor cores, of a warp
  double wavefronts;  // of shared memory
  double copied;      // bytes that blocks ask of L2 or memory: W, x
};
inline Counts count(const Size& s, const Plan& plan, const Gpu& g) {
  const int64_t panels = sm80::panels(s.n), records = sm80::records(s.k, s.bytes);
  if (plan.tile < 0) {
    const double weights = static_cast<double>(panels * records * sm80::record_bytes(s.bytes));
    const double tokens = s.m > 2 ? 4 : static_cast<double>(s.m);  // as the kernel is compiled
    // A warp stores four times 8 rows of a token; one warp a token then adds up what all have.
    const double wavefronts = panels * kGemvWarps * (4.0 * tokens + s.m);
    return {panels, ceil_div(panels, 2 * g.sms), 0, wavefronts,
            weights + 1.0 * panels * tokens * s.k * s.bytes};
  }
  const Tile& t = kTiles[plan.tile];
  const int64_t down = ceil_div(32 * panels, t.rows), across = ceil_div(s.m, t.tokens), tiles = down * across;
  const int64_t blocks = tiles * plan.splits,
                at_once = int64_t{g.sms} * std::max(1, resident_blocks(t, s.bytes, g));
  const double stages = static_cast<double>(ceil_div(records, t.records)), warps = threads(t) / 32.0;
  // A warp loads the first operands twice; at the end the sums, and one or two terms, pass through shared memory.
  const double outputs = t.rows * t.tokens / 32.0, terms = s.bytes == 1 ? 2 : 1;
  const double end = outputs * t.warps_k * 2 + terms * (t.rows / 32.0 + (plan.splits == 1 ? outputs : 0));
  Counts c;
  c.blocks = blocks, c.waves = ceil_div(blocks, at_once);
  c.matrix = tiles * records * (t.rows / 16.0) * (t.tokens / 8.0);
  c.wavefronts = tiles * stages * stage_counts(t, s.bytes).wavefronts +
                 blocks * (warps * operand_wavefronts(t, s.bytes) + end);
  c.copied = static_cast<double>(tiles) * records * (t.rows / 32.0) * sm80::record_bytes(s.bytes) +
             static_cast<double>(down) * s.m * s.k * s.bytes;
  return c;
}

// The plan of the least score; of equals the first.
inline Plan choose_plan(const Size& s, const Gpu& g) {
  Plan best = {-1, 1};
  double least = s.m <= kGemvTokens && s.bytes == 2 ? predict_gemv(s, g).score() : 1e300;
  for (int tile = 0; tile < kTileCount; ++tile) {
    if (resident_blocks(kTiles[tile], s.bytes, g) == 0) continue;
    const int64_t stages = ceil_div(sm80::records(s.k, s.bytes), kTiles[tile].records);
    for (int splits = 1; splits <= 8 && (splits == 1 || stages / splits >= kTiles[tile].stages); ++splits) {
      const double score = predict(s, kTiles[tile], splits, g).score();
      if (score < least) least = score, best = {tile, splits};
    }
  }
  return best;
}

}  // namespace lissom::sparse24
