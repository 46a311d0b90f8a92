// SPDX-License-Identifier: Apache-2.0
// bf16 and int8 on AMX tiles. A record (16 rows of W x 32 columns; in int8 two) is expanded in L1 to one dense B tile: row j
// of the tile holds the pairs (2j, 2j+1) of bf16, the quads j of int8, of all 16 rows. Zeroing byte shuffles do it, so the
// bytes read from memory stay those of the 2:4 form while the product runs at the dense tile rate. bf16 denormals count as
// zero, as TDPBF16PS defines.
#include "core/simd_avx512.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24::amx {
namespace {

using namespace simd_avx512;

#include "sparse24/cpu/sparse24_epilogue.inc"

constexpr int64_t kTokens = 16;  // rows of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kTileFloats = 256;
constexpr int64_t kPrefetchAhead = 4096;
constexpr int64_t kMostTiles = 3;  // token tiles whose sums, with two panels, fit the tile registers
constexpr int64_t kTokenBlockBytes = 1024 * 1024;  // packed x of a block of tokens, kept in L2
constexpr int64_t kPanelBlockBytes = 1024 * 1024;  // packed W of a block of panels, kept in L2
constexpr int64_t kStripBytes = 64 * 1024;         // expanded pair of panels
constexpr int64_t kRing = 4;                       // expanded records in flight
constexpr int64_t kLead = 3;                       // records between expansion and product

int64_t token_tiles(int64_t m) { return (m + kTokens - 1) / kTokens; }

// A step is what one B tile holds: 64 bytes of a row of x.
int64_t steps(const Linear& p) { return p.dtype == DType::i8 ? (records(p.k) + 1) / 2 : records(p.k); }

// packed x: [tile][step][token][64 bytes], 16 tokens a tile, fewer if there are fewer: an A tile lies in a row. (Read
// straight from x, rows a multiple of 4 KiB apart would fall into one L1 set.)
int64_t tile_tokens(const Linear& p) { return p.m < kTokens ? p.m : kTokens; }
int64_t x_step(const Linear& p) { return tile_tokens(p) * 64; }  // bytes
int64_t x_tiles(const Linear& p) { return token_tiles(p.m); }
size_t x_bytes(const Linear& p) { return static_cast<size_t>(token_tiles(p.m) * steps(p) * x_step(p)); }

// Where K is short, a pair of panels is expanded once for all token tiles; else records pass through a ring in L1.
int64_t slots(const Linear& p) {
  const bool reused = token_tiles(p.m) > kMostTiles && 2 * steps(p) * kTileBytes <= kStripBytes;
  return reused && steps(p) > kRing ? steps(p) : kRing;
}
size_t scratch_bytes(const Linear& p) { return static_cast<size_t>(2 * slots(p) * kTileBytes); }

// Bytes [at, at + 64) of a row of `bytes`; zero behind its end.
LISSOM_INLINE __m512i step_of_row(const char* row, int64_t bytes, int64_t at) {
  const int64_t left = bytes - at;
  const __mmask64 valid = left >= 64 ? ~__mmask64{0} : left <= 0 ? __mmask64{0} : (__mmask64{1} << left) - 1;
  return _mm512_maskz_loadu_epi8(valid, row + at);
}

template <DType T>
bool pack_x(const Linear& p, int64_t tile_begin, int64_t tile_end, void* packed_x) {
  const int64_t count = steps(p), size = element_bytes(T);
  const __m512i exponent = _mm512_set1_epi16(0x7f80);
  __mmask32 non_finite = 0;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    char* out = static_cast<char*>(packed_x) + t * count * x_step(p);
    for (int64_t r = 0; r < tile_tokens(p); ++r) {
      const int64_t m = t * kTokens + r;
      const char* x = static_cast<const char*>(p.x) + m * p.ldx * size;
      for (int64_t j = 0; j < count; ++j) {
        const __m512i v = step_of_row(x, m < p.m ? p.k * size : 0, 64 * j);
        _mm512_store_si512(out + j * x_step(p) + r * 64, v);
        if (T == DType::bf16) non_finite |= _mm512_cmpeq_epi16_mask(_mm512_and_si512(v, exponent), exponent);
      }
    }
  }
  return non_finite == 0;
}

// GCC's tile intrinsics do not tell the compiler which memory they read: without this it may move or drop the stores.
LISSOM_INLINE void stores_before_tiles() { __asm__ volatile("" ::: "memory"); }

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-5: sums (token tile a, panel b at 2a + b); 6: x; 7: W.
void configure(int64_t tokens) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 7 ? tokens : 16);
  }
  stores_before_tiles();
  _tile_loadconfig(&config);
}

// For every nibble, the four bytes of a dense lane of `columns` columns of `size` bytes from column `first` of a quad, as
// places in the kept pair, which lies from byte `at` of the lane on; 0x80 writes zero.
LISSOM_INLINE __m512i control_table(uint32_t first, uint32_t size, uint32_t at) {
  uint32_t table[16];
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    table[nibble] = 0;
    for (uint32_t b = 0; b < 4; ++b) {
      const uint32_t column = first + b / size;
      const uint32_t source = (nibble & 3u) == column   ? at + b % size
                              : (nibble >> 2) == column ? at + size + b % size
                                                        : 0x80u;
      table[nibble] |= source << (8 * b);
    }
  }
  return _mm512_loadu_si512(table);
}

// vpshufb counts bytes within 128 bits, so lane i of four adds 4i to the table's bytes; bit 7 (zero) survives that.
template <DType T>
struct Expander {
  __m512i low, high, lane;
};
template <DType T>
LISSOM_INLINE Expander<T> make_expander() {
  const __m512i lane = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
  if (T == DType::bf16) return {control_table(0, 2, 0), control_table(2, 2, 0), lane};
  return {control_table(0, 1, 0), control_table(0, 1, 2), lane};
}
// One record: bf16 fills 16 rows of the tile, two a quad; int8 fills 8, one a quad.
template <DType T>
LISSOM_INLINE void expand(const Expander<T>& e, const uint8_t* record, char* tile) {
  const __m512i meta = vu_load(record);
#pragma GCC unroll 8
  for (int v = 0; v < (T == DType::bf16 ? 8 : 4); ++v) {
    const __m512i kept = vu_load(record + kMetaBytes + 64 * v);
    const __m512i even = vu_shr(meta, T == DType::bf16 ? 4 * v : 8 * v);
    const __m512i odd = T == DType::bf16 ? even : vu_shr(meta, 8 * v + 4);
    const __m512i first = _mm512_or_si512(_mm512_permutexvar_epi32(even, e.low), e.lane);
    const __m512i second = _mm512_or_si512(_mm512_permutexvar_epi32(odd, e.high), e.lane);
    _mm512_store_si512(tile + 128 * v, _mm512_shuffle_epi8(kept, first));
    _mm512_store_si512(tile + 128 * v + 64, _mm512_shuffle_epi8(kept, second));
  }
}
// Step i of a panel behind its head. An odd number of int8 records leaves half a tile as it was: x is zero there.
template <DType T>
LISSOM_INLINE void expand_step(const Expander<T>& e, const uint8_t* first, int64_t i, int64_t count,
                               char* tile) {
  constexpr int64_t kBytes = record_bytes(T), kEach = T == DType::i8 ? 2 : 1;
  const uint8_t* record = first + i * kEach * kBytes;
  for (int64_t at = 0; at < kEach * kBytes; at += 64) prefetch(record + kPrefetchAhead + at);
  expand<T>(e, record, tile);
  if (kEach == 2 && 2 * i + 1 < count) expand<T>(e, record + kBytes, tile + 512);
}

template <int A, int B>
LISSOM_INLINE void clear_sums() {
  _tile_zero(0);
  if (B > 1) _tile_zero(1);
  if (A > 1) _tile_zero(2);
  if (A > 1 && B > 1) _tile_zero(3);
  if (A > 2) _tile_zero(4);
  if (A > 2 && B > 1) _tile_zero(5);
}

template <int A, int B>
LISSOM_INLINE void store_sums(float* out) {  // [a][b][16][16]
  _tile_stored(0, out, 64);
  if (B > 1) _tile_stored(1, out + kTileFloats, 64);
  if (A > 1) _tile_stored(2, out + B * kTileFloats, 64);
  if (A > 1 && B > 1) _tile_stored(3, out + 3 * kTileFloats, 64);
  if (A > 2) _tile_stored(4, out + 2 * B * kTileFloats, 64);
  if (A > 2 && B > 1) _tile_stored(5, out + 5 * kTileFloats, 64);
}

struct Weights {
  const uint8_t* panel;
  char* expanded;  // [slot][panel of pair][1 KiB]
  int64_t slots;
  bool ready;  // expanded already, by the token group before
};

// The intrinsics paste the number of the tile into the instruction's text: no function can pass it on.
#define LISSOM_TILE_DOT(sum)        \
  do {                              \
    if constexpr (T == DType::bf16) \
      _tile_dpbf16ps(sum, 6, 7);    \
    else                            \
      _tile_dpbssd(sum, 6, 7);      \
  } while (0)

// A token tiles times B panels over all of K, sums in tile registers. Records are expanded kLead ahead of their products:
// a tile load must wait until the stores it reads have left the store buffer, and meanwhile the products of earlier
// records occupy the AMX unit while the expansion uses the shuffle port.
template <DType T, int A, int B>
void product(const Linear& p, const char* x, const Weights& weights, int64_t m0, int64_t n0) {
  const Expander<T> e = make_expander<T>();
  const int64_t count = steps(p), step = x_step(p), x_next = count * step;
  const int64_t next_panel = panel_bytes(p.k, T);
  const int64_t lead = weights.ready ? 0 : kLead;
  int64_t in = 0, out_slot = 0;
  clear_sums<A, B>();
  for (int64_t i = 0; i < count + lead; ++i) {
    if (!weights.ready && i < count) {
      for (int b = 0; b < B; ++b)
        expand_step<T>(e, weights.panel + b * next_panel, i, records(p.k),
                       weights.expanded + (in * 2 + b) * kTileBytes);
      if (++in == weights.slots) in = 0;
    }
    if (i < lead) continue;
    const char* w = weights.expanded + out_slot * 2 * kTileBytes;
    if (++out_slot == weights.slots) out_slot = 0;
    stores_before_tiles();
    _tile_loadd(7, w, 64);
    _tile_loadd(6, x, 64);
    LISSOM_TILE_DOT(0);
    if (A > 1) _tile_loadd(6, x + x_next, 64);
    if (A > 1) LISSOM_TILE_DOT(2);
    if (A > 2) _tile_loadd(6, x + 2 * x_next, 64);
    if (A > 2) LISSOM_TILE_DOT(4);
    if (B > 1) {
      _tile_loadd(7, w + kTileBytes, 64);
      if (A > 2) LISSOM_TILE_DOT(5);
      if (A > 1) _tile_loadd(6, x + x_next, 64);
      if (A > 1) LISSOM_TILE_DOT(3);
      if (A > 1) _tile_loadd(6, x, 64);
      LISSOM_TILE_DOT(1);
    }
    x += step;
  }
  float out[A * B * kTileFloats];  // int32 in int8
  store_sums<A, B>(out);
  stores_before_tiles();  // and loads after them
  for (int64_t a = 0; a < A; ++a) {
    const int64_t m = m0 + a * kTokens;
    finish(p, {out + a * B * kTileFloats, 16, kTileFloats}, m, p.m - m < kTokens ? p.m - m : kTokens, n0, B);
  }
}
#undef LISSOM_TILE_DOT

template <DType T, int B>
void product_of(int64_t tiles, const Linear& p, const char* x, const Weights& w, int64_t m0, int64_t n0) {
  switch (tiles) {
    case 1: return product<T, 1, B>(p, x, w, m0, n0);
    case 2: return product<T, 2, B>(p, x, w, m0, n0);
    default: return product<T, 3, B>(p, x, w, m0, n0);
  }
}

// What one call of run works on.
struct Job {
  const Linear& p;
  const char* x;
  char* expanded;
};

// Token tiles [t, t + tiles) times the pair of panels at a.
template <DType T>
void group_times_pair(const Job& job, int64_t t, int64_t tiles, int64_t a, int64_t panel_end, bool ready) {
  const Linear& p = job.p;
  const uint8_t* panel = p.records + a * panel_bytes(p.k, T) + panel_head_bytes(T);
  const Weights w = {panel, job.expanded, slots(p), ready};
  const char* x = job.x + t * steps(p) * x_step(p);
  if (a + 1 < panel_end)
    product_of<T, 2>(tiles, p, x, w, t * kTokens, a * kPanelRows);
  else
    product_of<T, 1>(tiles, p, x, w, t * kTokens, a * kPanelRows);
}

int64_t tokens_block(const Linear& p) {  // token tiles, whole groups
  const int64_t rows = equal_tiles(token_tiles(p.m), kMostTiles).rows;
  const int64_t fit = kTokenBlockBytes / (rows * (steps(p) + 1) * kTileBytes);
  return rows * (fit < 1 ? 1 : fit);
}

// K short: a block of tokens, its packed x in L2, meets pair after pair of panels, each expanded once for the block.
template <DType T>
void run_token_blocks(const Job& job, int64_t panel_begin, int64_t panel_end) {
  const int64_t tiles = token_tiles(job.p.m), block = tokens_block(job.p),
                rows = equal_tiles(tiles, kMostTiles).rows;
  const bool kept = slots(job.p) >= steps(job.p);
  for (int64_t t0 = 0; t0 < tiles; t0 += block) {
    const int64_t t1 = t0 + block < tiles ? t0 + block : tiles;
    for (int64_t a = panel_begin; a < panel_end; a += 2)
      for (int64_t t = t0; t < t1; t += rows)
        group_times_pair<T>(job, t, t1 - t < rows ? t1 - t : rows, a, panel_end, kept && t > t0);
  }
}

// K long: a block of panels comes from memory once and stays in L2 while every group of token tiles passes by.
template <DType T>
void run_panel_blocks(const Job& job, int64_t panel_begin, int64_t panel_end) {
  const int64_t tiles = token_tiles(job.p.m), rows = equal_tiles(tiles, kMostTiles).rows;
  const int64_t fit = kPanelBlockBytes / panel_bytes(job.p.k, T) / 2 * 2;
  const int64_t block = fit < 2 ? 2 : fit;
  for (int64_t a0 = panel_begin; a0 < panel_end; a0 += block) {
    const int64_t a1 = a0 + block < panel_end ? a0 + block : panel_end;
    for (int64_t t = 0; t < tiles; t += rows)
      for (int64_t a = a0; a < a1; a += 2)
        group_times_pair<T>(job, t, tiles - t < rows ? tiles - t : rows, a, panel_end, false);
  }
}

template <DType T>
void run(const Linear& p, const void* packed_x, int64_t panel_begin, int64_t panel_end, void* scratch) {
  const Job job = {p, static_cast<const char*>(packed_x), static_cast<char*>(scratch)};
  configure(p.m < kTokens ? p.m : kTokens);
  slots(p) >= steps(p) ? run_token_blocks<T>(job, panel_begin, panel_end)
                       : run_panel_blocks<T>(job, panel_begin, panel_end);
  _tile_release();
}

}  // namespace

extern const Path kTiles, kTilesInt8;
const Path kTiles = {"tiles", x_tiles, x_bytes, pack_x<DType::bf16>, scratch_bytes, run<DType::bf16>};
const Path kTilesInt8 = {"tiles", x_tiles, x_bytes, pack_x<DType::i8>, scratch_bytes, run<DType::i8>};

}  // namespace lissom::sparse24::amx
