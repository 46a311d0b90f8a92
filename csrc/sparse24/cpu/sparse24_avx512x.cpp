// SPDX-License-Identifier: Apache-2.0
// The permuted path with dot products. bf16: in pairs, for cores where vdpbf16ps is as fast as an FMA (Zen 4, Zen 5);
// denormal inputs and results of that instruction count as zero. int8: in fours, from unsigned activations.
#include "core/simd_avx512.h"
#include "sparse24/sparse24.h"

namespace lissom::sparse24::avx512x {
namespace {

using namespace simd_avx512;

constexpr int64_t kTileRows = 8;
constexpr int64_t kPanelPair = 2;
constexpr int64_t kTokenBlock = 256;
constexpr int64_t kPrefetchAhead = 2048;

// clang-format off: each builds on the one before
#include "sparse24/cpu/sparse24_epilogue.inc"
#include "sparse24/cpu/sparse24_tiling.inc"
// clang-format on

LISSOM_INLINE void prefetch_record(const uint8_t* record, int64_t bytes) {
  for (int64_t b = 0; b < bytes; b += 64) prefetch(record + kPrefetchAhead + b);
}
LISSOM_INLINE __m512i broadcast8(const char* bytes) {
  long long bits;
  memcpy(&bits, bytes, 8);
  return _mm512_set1_epi64(bits);
}

// Both types: [tile][8 bytes of a row: 4 columns of bf16, 8 of int8][row of tile], K padded to whole records; `flip` is
// exclusive-or'ed with them.
template <int64_t kSize, uint64_t kFlip>
bool pack_x(const Linear& p, int64_t tile_begin, int64_t tile_end, void* packed_x) {
  const int64_t rows = equal_tiles(p.m, kTileRows).rows;
  const int64_t row_bytes = p.k * kSize, groups = records(p.k) * kRecordColumns * kSize / 8;
  for (int64_t t = tile_begin; t < tile_end; ++t) {
    const int64_t m0 = t * rows, here = p.m - m0 < rows ? p.m - m0 : rows;
    uint64_t* out = static_cast<uint64_t*>(packed_x) + m0 * groups;
    for (int64_t r = 0; r < here; ++r) {
      const char* x = static_cast<const char*>(p.x) + (m0 + r) * p.ldx * kSize;
      for (int64_t g = 0; g < groups; ++g) {
        uint64_t eight = 0;
        if (8 * g + 8 <= row_bytes)
          memcpy(&eight, x + 8 * g, 8);
        else if (8 * g < row_bytes)
          memcpy(&eight, x + 8 * g, 4);
        out[g * here + r] = eight ^ kFlip;
      }
    }
  }
  return true;
}

struct DotBf16 {
  static constexpr DType kType = DType::bf16;
  static constexpr int64_t kColumnBytes = 2, kPairsFrom = 3;

  template <int P, int R>
  static void tile(const Linear& p, const char* x, const uint8_t* panel, int64_t m0, int64_t n0) {
    constexpr int64_t kBytes = record_bytes(kType);
    const int64_t count = records(p.k);
    const int64_t next_panel = panel_bytes(p.k, kType);
    vf acc[P][R];
    for (int a = 0; a < P; ++a)
      for (int r = 0; r < R; ++r) acc[a][r] = vf_zero();
    for (int64_t j = 0; j < count; ++j, panel += kBytes) {
      __m512i meta[P];
      for (int a = 0; a < P; ++a) {
        meta[a] = vu_load(panel + a * next_panel);
        prefetch_record(panel + a * next_panel, kBytes);
      }
#pragma GCC unroll 8
      for (int q = 0; q < kRecordQuads; ++q, x += 8 * R) {
        for (int a = 0; a < P; ++a) {
          const __m512bh w =
              reinterpret_cast<__m512bh>(vu_load(panel + a * next_panel + kMetaBytes + 64 * q));
          const __m512i control = vu_pair_index(meta[a], 4 * q);
          for (int r = 0; r < R; ++r) {
            const __m512i pair = _mm512_shuffle_epi8(broadcast8(x + 8 * r), control);
            acc[a][r] = _mm512_dpbf16_ps(acc[a][r], w, reinterpret_cast<__m512bh>(pair));
          }
        }
      }
    }
    float out[R * P * 16];
    for (int a = 0; a < P; ++a)
      for (int r = 0; r < R; ++r) vf_store(out + (r * P + a) * 16, acc[a][r]);
    finish(p, {out, P * 16, 16}, m0, R, n0, P);
  }
};

// vpdpbusd multiplies unsigned by signed bytes, so packed x holds x + 128 (the sign bit flipped), and 128 times the sum of
// the row of W, which lies in front of the panel, is taken off at the start. Everything wraps at 2^32, so the sum is right
// whenever it fits int32.
struct DotInt8 {
  static constexpr DType kType = DType::i8;
  static constexpr int64_t kColumnBytes = 1, kPairsFrom = 3;

  // Bytes that move the kept pair of the even quad of eight columns into bytes 0, 1 of a lane, of the odd one into 2, 3.
  LISSOM_INLINE __m512i table(bool odd) {
    uint32_t bytes[16];
    for (uint32_t nibble = 0; nibble < 16; ++nibble) {
      const uint32_t pair = (nibble & 3u) | (nibble >> 2) << 8;
      bytes[nibble] = odd ? (pair + 0x0404u) << 16 : pair;
    }
    return _mm512_loadu_si512(bytes);
  }

  template <int P, int R>
  static void tile(const Linear& p, const char* x, const uint8_t* panel, int64_t m0, int64_t n0) {
    constexpr int64_t kBytes = record_bytes(kType);
    const __m512i even = table(false), odd = table(true);
    const int64_t count = records(p.k), next_panel = panel_bytes(p.k, kType);
    __m512i acc[P][R];
    for (int a = 0; a < P; ++a) {
      const __m512i offset = _mm512_slli_epi32(vu_load(panel + a * next_panel), 7);
      for (int r = 0; r < R; ++r) acc[a][r] = _mm512_sub_epi32(_mm512_setzero_si512(), offset);
    }
    panel += panel_head_bytes(kType);
    for (int64_t j = 0; j < count; ++j, panel += kBytes) {
      __m512i meta[P];
      for (int a = 0; a < P; ++a) {
        meta[a] = vu_load(panel + a * next_panel);
        prefetch_record(panel + a * next_panel, kBytes);
      }
#pragma GCC unroll 4
      for (int v = 0; v < kRecordQuads / 2; ++v, x += 8 * R) {
        for (int a = 0; a < P; ++a) {
          const __m512i w = vu_load(panel + a * next_panel + kMetaBytes + 64 * v);
          const __m512i control = _mm512_or_si512(_mm512_permutexvar_epi32(vu_shr(meta[a], 8 * v), even),
                                                  _mm512_permutexvar_epi32(vu_shr(meta[a], 8 * v + 4), odd));
          for (int r = 0; r < R; ++r) {
            const __m512i four = _mm512_shuffle_epi8(broadcast8(x + 8 * r), control);
            acc[a][r] = _mm512_dpbusd_epi32(acc[a][r], four, w);
          }
        }
      }
    }
    float out[R * P * 16];
    for (int a = 0; a < P; ++a)
      for (int r = 0; r < R; ++r) vu_store(out + (r * P + a) * 16, acc[a][r]);
    finish(p, {out, P * 16, 16}, m0, R, n0, P);
  }
};

template <class Kernel, int64_t kSize, uint64_t kFlip>
constexpr Path kPath = {"permuted-dot",       tiled_x_tiles, tiled_x_bytes<Kernel>,
                        pack_x<kSize, kFlip>, no_scratch,    run_tiles<Kernel>};

}  // namespace

extern const Path kDot, kDotInt8;
const Path kDot = kPath<DotBf16, 2, 0>;
const Path kDotInt8 = kPath<DotInt8, 1, 0x8080808080808080u>;

}  // namespace lissom::sparse24::avx512x
