// SPDX-License-Identifier: Apache-2.0
// y = x W^T for at most four tokens, without tensor cores: W is read once, at the speed of memory.
//
// A block takes one panel of W, and its warps take the records in turn, kAhead at a time, all of whose loads are under way before
// the first is used. A record lies in fragment order (layout.h, "sm80-v1"), so a lane gets the pairs of quads t and t + 4 of rows
// g, g + 8, g + 16 and g + 24 and needs only those two quads of x. They come straight into registers: no other warp of the block
// wants them. A byte permutation picks the two kept elements of a quad.
#pragma once

#include "sparse24/cuda/epilogue.cuh"
#include "sparse24/cuda/sync.cuh"
#include "sparse24/cuda/tiles.h"

namespace lissom::sparse24 {

template <class T, int kTokens>
struct Gemv {
  static constexpr int kThreads = 32 * kGemvWarps;
  static constexpr int kSharedBytes = gemv_shared_bytes(kTokens);
  static constexpr int kRecordBytes = sm80::record_bytes(2), kMetaBytes = sm80::meta_bytes(2);
  static constexpr int kAhead = kTokens == 4 ? 2 : 4;

  using Quad = dev::Vec<uint32_t, 2>;
  using Words = dev::Vec<uint32_t, 4>;
  struct Record {
    Words meta, pairs[2];
    Quad x[kTokens][2];
  };

  const Work& w;
  const uint8_t* panel;
  const T* x[kTokens];
  int g, t;
  float sums[2][2][kTokens] = {};  // [fragment][half][token]

  LISSOM_DEVICE explicit Gemv(const Work& work) : w(work), g(dev::lane() / 4), t(dev::lane() % 4) {
    panel = static_cast<const uint8_t*>(w.p.records) + dev::block_x() * w.records * kRecordBytes;
    // A token that does not exist is read as the last one; its sums are never stored.
    LISSOM_UNROLL for (int i = 0; i < kTokens; ++i) x[i] =
        static_cast<const T*>(w.p.x) + (i < w.p.m ? i : w.p.m - 1) * w.p.x_stride + 4 * t;
  }

  LISSOM_DEVICE void load(Record& r, int64_t record) const {
    const uint8_t* at = panel + record * kRecordBytes;
    r.meta = dev::load_stream(reinterpret_cast<const Words*>(at) + g);
    LISSOM_UNROLL for (int f = 0; f < 2; ++f) r.pairs[f] =
        dev::load_stream(reinterpret_cast<const Words*>(at + kMetaBytes + 512 * f) + dev::lane());
    LISSOM_UNROLL for (int s = 0; s < 2; ++s) {
      const int64_t column = 32 * record + 16 * s;
      const bool here = column + 4 * t < w.p.k;
      LISSOM_UNROLL for (int i = 0; i < kTokens; ++i) r.x[i][s] =
          here ? dev::load(reinterpret_cast<const Quad*>(x[i] + column)) : Quad{};
    }
  }

  LISSOM_DEVICE void add(const Record& r) {
    LISSOM_UNROLL for (int f = 0; f < 2; ++f) LISSOM_UNROLL for (int s = 0; s < 2; ++s) {
      const uint32_t nibbles = r.meta[2 * f + s] >> (4 * t);
      LISSOM_UNROLL for (int half = 0; half < 2; ++half) {
        const uint32_t nibble = nibbles >> (16 * half);
        // Bytes 2 p0, 2 p0 + 1, 2 p1, 2 p1 + 1 of the quad.
        const uint32_t selector = 0x1010u + (nibble & 3u) * 0x22u + (nibble & 12u) * 0x880u;
        const auto pair = dev::unpack<T>(r.pairs[f][2 * s + half]);
        LISSOM_UNROLL for (int i = 0; i < kTokens; ++i) {
          const auto met = dev::unpack<T>(dev::permute_bytes(r.x[i][s][0], r.x[i][s][1], selector));
          sums[f][half][i] = dev::fma(pair[1], met[1], dev::fma(pair[0], met[0], sums[f][half][i]));
        }
      }
    }
  }

  template <int kCount>
  LISSOM_DEVICE void add_records(int64_t first) {
    Record r[kCount];
    LISSOM_UNROLL for (int i = 0; i < kCount; ++i) load(r[i], first + i);
    LISSOM_UNROLL for (int i = 0; i < kCount; ++i) add(r[i]);
  }

  LISSOM_DEVICE void run() {
    const int64_t whole = w.records / kAhead * kAhead;
    for (int64_t i = dev::warp() * kAhead; i < whole; i += kGemvWarps * kAhead) add_records<kAhead>(i);
    if constexpr (kAhead != 2)  // records come in twos
      for (int64_t i = whole + dev::warp(); i < w.records; i += kGemvWarps) add_records<1>(i);
  }

  LISSOM_DEVICE void store() const {
    const auto shared = dev::shared<float>(0);  // [warp][token][row]
    LISSOM_UNROLL for (int f = 0; f < 2; ++f) LISSOM_UNROLL for (int half = 0; half < 2; ++half) {
      LISSOM_UNROLL for (int i = 0; i < kTokens; ++i) {
        float sum = sums[f][half][i];
        sum += dev::shuffle_xor(sum, 1);
        sum += dev::shuffle_xor(sum, 2);
        if (t == 0) shared.store((dev::warp() * kTokens + i) * 32 + 16 * f + 8 * half + g, sum);
      }
    }
    LISSOM_SYNC(20, dev::barrier());
    const int token = dev::warp(), row = dev::lane();
    if (token >= kTokens || token >= w.p.m) return;
    float v[1] = {0.0f};
    for (int i = 0; i < kGemvWarps; ++i) v[0] += shared.load((i * kTokens + token) * 32 + row);
    const int64_t n = 32 * int64_t{dev::block_x()} + row;
    v[0] += bias_of(w, n);
    if (w.p.out == static_cast<int>(DType::f32))
      finish<float>(w, token, n, v);
    else
      finish<T>(w, token, n, v);
  }
};

template <class T, int kTokens>
LISSOM_KERNEL(32 * kGemvWarps, 2)
sparse24_gemv(const Work work) {
  Gemv<T, kTokens> block(work);
  block.run();
  block.store();
}

}  // namespace lissom::sparse24
