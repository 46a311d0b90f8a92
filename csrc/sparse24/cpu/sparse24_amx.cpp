// SPDX-License-Identifier: Apache-2.0
// bf16 on AMX tiles. A record (16 rows of W x 32 columns) is expanded in L1 to one dense B tile: row j of the tile holds
// the pairs (2j, 2j+1) of all 16 rows. Two zeroing byte shuffles a quad do it, so the bytes read from memory stay those
// of the 2:4 form while the product runs at the dense tile rate. Denormals count as zero, as TDPBF16PS defines.
#include "core/simd_avx512.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24::amx {
namespace {

using namespace simd_avx512;

#include "sparse24/cpu/sparse24_epilogue.inc"

constexpr int64_t kTokens = 16;  // rows of a tile
constexpr int64_t kTileBytes = 1024;
constexpr int64_t kBytes = record_bytes(DType::bf16);
constexpr int64_t kChunk = 16;               // records expanded at once: 2 panels x 16 KiB stay in L1
constexpr int64_t kPrefetchAhead = 4096;
constexpr int64_t kBlockBytes = 1024 * 1024;  // packed x of a token block: half of L2

// packed x: [tile of 16 tokens][record][16 tokens][32] bf16: every A tile is 1 KiB in a row. (Read straight from x,
// rows a multiple of 4 KiB apart would fall into one L1 set.)
int64_t token_tiles(int64_t m) { return (m + kTokens - 1) / kTokens; }
int64_t x_tiles(const Linear& p) { return token_tiles(p.m); }
size_t x_bytes(const Linear& p) { return static_cast<size_t>(token_tiles(p.m) * records(p.k) * kTileBytes); }

void pack_x(const Linear& p, int64_t tile_begin, int64_t tile_end, void* packed_x) {
  const int64_t count = records(p.k);
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    char* out = static_cast<char*>(packed_x) + t * count * kTileBytes;
    for (int64_t r = 0; r < kTokens; ++r) {
      const int64_t m = t * kTokens + r;
      const uint16_t* x = static_cast<const uint16_t*>(p.x) + m * p.ldx;
      for (int64_t j = 0; j < count; ++j) {
        const int64_t left = m < p.m ? p.k - j * kRecordColumns : 0;
        const __mmask32 valid = left >= 32 ? ~__mmask32{0} : left <= 0 ? __mmask32{0} : (__mmask32{1} << left) - 1;
        _mm512_store_si512(out + j * kTileBytes + r * 64, _mm512_maskz_loadu_epi16(valid, x + j * kRecordColumns));
      }
    }
  }
}

struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Tiles 0-3: sums (a: token tile, b: panel, at 2a + b); 4, 5: x; 6, 7: W.
void configure(int64_t tokens) {
  TileConfig config;
  for (int i = 0; i < 8; ++i) {
    config.row_bytes[i] = 64;
    config.rows[i] = static_cast<uint8_t>(i < 6 ? tokens : 16);
  }
  _tile_loadconfig(&config);
}

// Bytes that move a quad's kept pair into its dense pair of columns `half` (0: 0, 1; 1: 2, 3); 0x80 writes zero.
LISSOM_INLINE __m512i control_table(uint32_t half) {
  uint32_t table[16];
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    table[nibble] = 0;
    for (uint32_t c = 0; c < 2; ++c) {
      const uint32_t column = 2 * half + c;
      const uint32_t source = (nibble & 3u) == column ? 0x0100u : (nibble >> 2) == column ? 0x0302u : 0x8080u;
      table[nibble] |= source << (16 * c);
    }
  }
  return _mm512_loadu_si512(table);
}

// vpshufb counts bytes within 128 bits, so lane i of four adds 4i to the table's bytes; bit 7 (zero) survives that.
struct Expander {
  __m512i low, high, lane;
};
LISSOM_INLINE Expander make_expander() {
  return {control_table(0), control_table(1),
          _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0)};
}
LISSOM_INLINE void expand(const Expander& e, const uint8_t* record, char* tile) {
  const __m512i meta = vu_load(record);
#pragma GCC unroll 8
  for (int q = 0; q < kRecordQuads; ++q) {
    const __m512i kept = vu_load(record + kMetaBytes + 64 * q);
    const __m512i index = vu_shr(meta, 4 * q);
    const __m512i first = _mm512_or_si512(_mm512_permutexvar_epi32(index, e.low), e.lane);
    const __m512i second = _mm512_or_si512(_mm512_permutexvar_epi32(index, e.high), e.lane);
    _mm512_store_si512(tile + 128 * q, _mm512_shuffle_epi8(kept, first));
    _mm512_store_si512(tile + 128 * q + 64, _mm512_shuffle_epi8(kept, second));
  }
}

// Few tokens: the sums of one or two token tiles stay in registers over all of K. Memory-bound.
template <int A, int B>
void narrow(const Linear& p, const char* x, const uint8_t* panel, int64_t m0, int64_t n0, char* scratch) {
  const Expander e = make_expander();
  const int64_t count = records(p.k);
  const int64_t next_panel = panel_bytes(p.k, DType::bf16);
  _tile_zero(0);
  if (B > 1) _tile_zero(1);
  if (A > 1) _tile_zero(2);
  if (A > 1 && B > 1) _tile_zero(3);
  for (int64_t j = 0; j < count; ++j) {
    char* w = scratch + (j % 4) * 2 * kTileBytes;
    for (int b = 0; b < B; ++b) {
      const uint8_t* record = panel + b * next_panel + j * kBytes;
      for (int64_t at = 0; at < kBytes; at += 64) prefetch(record + kPrefetchAhead + at);
      expand(e, record, w + b * kTileBytes);
    }
    _tile_loadd(4, x + j * kTileBytes, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (B > 1) {
      _tile_loadd(7, w + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (A > 1) {
      _tile_loadd(5, x + (count + j) * kTileBytes, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (B > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  float out[A * B][16 * 16];
  _tile_stored(0, out[0], 64);
  if (B > 1) _tile_stored(1, out[1], 64);
  if (A > 1) _tile_stored(2, out[B], 64);
  if (A > 1 && B > 1) _tile_stored(3, out[B + 1], 64);
  for (int a = 0; a < A; ++a) {
    const int64_t rows = p.m - m0 - a * kTokens < kTokens ? p.m - m0 - a * kTokens : kTokens;
    for (int b = 0; b < B; ++b) finish(p, out[a * B + b], 16, m0 + a * kTokens, rows, n0 + 16 * b, 1);
  }
}

// Many tokens. A chunk of two panels is expanded once and used by every token tile of the block, whose packed x stays in
// L2; the sums wait in `sums` between chunks.
template <int A, int B>
LISSOM_INLINE void multiply(const char* x, int64_t x_next, const char* w, int64_t count, float* sums, bool first) {
  if (first) {
    _tile_zero(0);
    if (B > 1) _tile_zero(1);
    if (A > 1) _tile_zero(2);
    if (A > 1 && B > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, sums, 64);
    if (B > 1) _tile_loadd(1, sums + 256, 64);
    if (A > 1) _tile_loadd(2, sums + 512, 64);
    if (A > 1 && B > 1) _tile_loadd(3, sums + 768, 64);
  }
  for (int64_t j = 0; j < count; ++j, x += kTileBytes, w += 2 * kTileBytes) {
    _tile_loadd(4, x, 64);
    _tile_loadd(6, w, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (B > 1) {
      _tile_loadd(7, w + kTileBytes, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (A > 1) {
      _tile_loadd(5, x + x_next, 64);
      _tile_dpbf16ps(2, 5, 6);
      if (B > 1) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, sums, 64);
  if (B > 1) _tile_stored(1, sums + 256, 64);
  if (A > 1) _tile_stored(2, sums + 512, 64);
  if (A > 1 && B > 1) _tile_stored(3, sums + 768, 64);
}

int64_t block_tiles(const Linear& p) {
  const int64_t fit = kBlockBytes / (records(p.k) * kTileBytes);
  const int64_t most = fit < 4 ? 4 : fit;
  return (equal_tiles(token_tiles(p.m), most).rows + 1) / 2 * 2;
}

template <int B>
void wide(const Linear& p, const char* x, const uint8_t* panel, int64_t t0, int64_t t1, int64_t n0, char* scratch) {
  const Expander e = make_expander();
  const int64_t count = records(p.k);
  const int64_t next_panel = panel_bytes(p.k, DType::bf16);
  char* w = scratch;
  float* sums = reinterpret_cast<float*>(scratch + 2 * kChunk * kTileBytes);  // [pair of tiles][a][b][16][16]
  for (int64_t j = 0; j < count; j += kChunk) {
    const int64_t here = count - j < kChunk ? count - j : kChunk;
    for (int64_t i = 0; i < here; ++i)
      for (int b = 0; b < B; ++b) {
        const uint8_t* record = panel + b * next_panel + (j + i) * kBytes;
        expand(e, record, w + (2 * i + b) * kTileBytes);
        for (int64_t at = 0; at < kBytes; at += 64) _mm_prefetch(record + kChunk * kBytes + at, _MM_HINT_T1);
      }
    for (int64_t t = t0; t < t1; t += 2) {
      const char* from = x + (t * count + j) * kTileBytes;
      float* to = sums + (t - t0) / 2 * 1024;
      if (t + 1 < t1)
        multiply<2, B>(from, count * kTileBytes, w, here, to, j == 0);
      else
        multiply<1, B>(from, 0, w, here, to, j == 0);
    }
  }
  for (int64_t t = t0; t < t1; ++t) {
    const int64_t rows = p.m - t * kTokens < kTokens ? p.m - t * kTokens : kTokens;
    const float* from = sums + (t - t0) / 2 * 1024 + (t - t0) % 2 * 512;
    for (int b = 0; b < B; ++b) finish(p, from + 256 * b, 16, t * kTokens, rows, n0 + 16 * b, 1);
  }
}

size_t scratch_bytes(const Linear& p) {
  return static_cast<size_t>(2 * kChunk * kTileBytes + block_tiles(p) * 2 * kTileBytes);
}

void run(const Linear& p, const void* packed_x, int64_t panel_begin, int64_t panel_end, void* scratch) {
  const char* x = static_cast<const char*>(packed_x);
  char* own = static_cast<char*>(scratch);
  const int64_t tiles = token_tiles(p.m);
  const int64_t block = tiles > 2 ? block_tiles(p) : 2;
  configure(p.m < kTokens ? p.m : kTokens);
  for (int64_t t0 = 0; t0 < tiles; t0 += block) {
    const int64_t t1 = t0 + block < tiles ? t0 + block : tiles;
    int64_t step = 2;
    for (int64_t a = panel_begin; a < panel_end; a += step) {
      step = a + 1 < panel_end ? 2 : 1;
      const uint8_t* panel = p.records + a * panel_bytes(p.k, DType::bf16);
      const int64_t n0 = a * kPanelRows;
      if (tiles > 2)
        step == 2 ? wide<2>(p, x, panel, t0, t1, n0, own) : wide<1>(p, x, panel, t0, t1, n0, own);
      else if (tiles == 2)
        step == 2 ? narrow<2, 2>(p, x, panel, 0, n0, own) : narrow<2, 1>(p, x, panel, 0, n0, own);
      else
        step == 2 ? narrow<1, 2>(p, x, panel, 0, n0, own) : narrow<1, 1>(p, x, panel, 0, n0, own);
    }
  }
  _tile_release();
}

}  // namespace

extern const Path kTiles;
const Path kTiles = {"tiles", x_tiles, x_bytes, pack_x, scratch_bytes, run};

}  // namespace lissom::sparse24::amx
