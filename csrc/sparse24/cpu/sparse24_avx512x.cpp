// SPDX-License-Identifier: Apache-2.0
// bf16 with the dot-product instruction: the permuted path in pairs of bf16, for cores where vdpbf16ps is as fast as an
// FMA (Zen 4, Zen 5). Denormal inputs and results of that instruction count as zero.
#include "core/simd_avx512.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24::avx512x {
namespace {

using namespace simd_avx512;

#include "sparse24/cpu/sparse24_epilogue.inc"

constexpr int64_t kTileRows = 8;
constexpr int64_t kTokenBlock = 256;
constexpr int64_t kPrefetchAhead = 2048;
constexpr int64_t kBytes = record_bytes(DType::bf16);

// packed x: [tile][quad][row of tile][4] bf16, K padded to whole records.
int64_t x_tiles(const Linear& p) { return equal_tiles(p.m, kTileRows).count; }
size_t x_bytes(const Linear& p) { return static_cast<size_t>(p.m * records(p.k) * kRecordColumns) * 2; }
size_t scratch_bytes(const Linear&) { return 0; }

bool pack_x(const Linear& p, int64_t tile_begin, int64_t tile_end, void* packed_x) {
  const int64_t rows = equal_tiles(p.m, kTileRows).rows;
  const int64_t quads = records(p.k) * kRecordQuads;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const int64_t m0 = t * rows;
    const int64_t here = p.m - m0 < rows ? p.m - m0 : rows;
    uint64_t* out = static_cast<uint64_t*>(packed_x) + m0 * quads;
    for (int64_t r = 0; r < here; ++r) {
      const uint16_t* x = static_cast<const uint16_t*>(p.x) + (m0 + r) * p.ldx;
      for (int64_t q = 0; q < quads; ++q) {
        uint64_t four = 0;
        if (4 * q < p.k) memcpy(&four, x + 4 * q, 8);
        out[q * here + r] = four;
      }
    }
  }
  return true;
}

// For each nibble the four bytes that vpshufb needs to move (x[p0], x[p1]) into a 32-bit lane.
LISSOM_INLINE __m512i control_table() {
  uint32_t table[16];
  for (uint32_t nibble = 0; nibble < 16; ++nibble) {
    const uint32_t a = 2 * (nibble & 3u), b = 2 * (nibble >> 2);
    table[nibble] = a | (a + 1) << 8 | b << 16 | (b + 1) << 24;
  }
  return _mm512_loadu_si512(table);
}

template <int P, int R>
void tile(const Linear& p, const uint64_t* x, const uint8_t* panel, int64_t m0, int64_t n0) {
  const __m512i table = control_table();
  const int64_t count = records(p.k);
  const int64_t next_panel = panel_bytes(p.k, DType::bf16);
  vf acc[P][R];
  for (int a = 0; a < P; ++a)
    for (int r = 0; r < R; ++r) acc[a][r] = vf_zero();
  for (int64_t j = 0; j < count; ++j, panel += kBytes) {
    __m512i meta[P];
    for (int a = 0; a < P; ++a) {
      meta[a] = vu_load(panel + a * next_panel);
      for (int64_t b = 0; b < kBytes; b += 64) prefetch(panel + a * next_panel + kPrefetchAhead + b);
    }
#pragma GCC unroll 8
    for (int q = 0; q < kRecordQuads; ++q, x += R) {
      for (int a = 0; a < P; ++a) {
        const __m512bh w = reinterpret_cast<__m512bh>(vu_load(panel + a * next_panel + kMetaBytes + 64 * q));
        const __m512i control = _mm512_permutexvar_epi32(vu_shr(meta[a], 4 * q), table);
        for (int r = 0; r < R; ++r) {
          const __m512i four = _mm512_set1_epi64(static_cast<long long>(x[r]));
          acc[a][r] =
              _mm512_dpbf16_ps(acc[a][r], w, reinterpret_cast<__m512bh>(_mm512_shuffle_epi8(four, control)));
        }
      }
    }
  }
  float out[R * P * 16];
  for (int a = 0; a < P; ++a)
    for (int r = 0; r < R; ++r) vf_store(out + (r * P + a) * 16, acc[a][r]);
  finish(p, {out, P * 16, 16}, m0, R, n0, P);
}

template <int P>
void tile_of(const Linear& p, int64_t rows, const uint64_t* x, const uint8_t* panel, int64_t m0, int64_t n0) {
  switch (rows) {
    case 1: return tile<P, 1>(p, x, panel, m0, n0);
    case 2: return tile<P, 2>(p, x, panel, m0, n0);
    case 3: return tile<P, 3>(p, x, panel, m0, n0);
    case 4: return tile<P, 4>(p, x, panel, m0, n0);
    case 5: return tile<P, 5>(p, x, panel, m0, n0);
    case 6: return tile<P, 6>(p, x, panel, m0, n0);
    case 7: return tile<P, 7>(p, x, panel, m0, n0);
    default: return tile<P, 8>(p, x, panel, m0, n0);
  }
}

void run(const Linear& p, const void* packed_x, int64_t panel_begin, int64_t panel_end, void*) {
  const Tiling tiles = equal_tiles(p.m, kTileRows);
  const int64_t quads = records(p.k) * kRecordQuads;
  const int64_t block = tiles.rows ? kTokenBlock / tiles.rows : 1;
  for (int64_t t0 = 0; t0 < tiles.count; t0 += block) {
    const int64_t t1 = t0 + block < tiles.count ? t0 + block : tiles.count;
    int64_t step = 1;
    for (int64_t a = panel_begin; a < panel_end; a += step) {
      step = p.m > 2 && a + 1 < panel_end ? 2 : 1;
      const uint8_t* panel = p.records + a * panel_bytes(p.k, DType::bf16);
      for (int64_t t = t0; t < t1; ++t) {
        const int64_t m0 = t * tiles.rows;
        const int64_t rows = p.m - m0 < tiles.rows ? p.m - m0 : tiles.rows;
        const uint64_t* x = static_cast<const uint64_t*>(packed_x) + m0 * quads;
        if (step == 2)
          tile_of<2>(p, rows, x, panel, m0, a * kPanelRows);
        else
          tile_of<1>(p, rows, x, panel, m0, a * kPanelRows);
      }
    }
  }
}

}  // namespace

extern const Path kDot;
const Path kDot = {"permuted-dot", x_tiles, x_bytes, pack_x, scratch_bytes, run};

}  // namespace lissom::sparse24::avx512x
