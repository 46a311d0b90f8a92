// SPDX-License-Identifier: Apache-2.0
// Canonical form to sm80-v1 and back, drawn in layout.h. To pack, a warp makes one record and each lane the registers that it
// will hold in the product; to unpack, a warp writes one row. Bytes: size of an element, 2 or 1 (int8).
#pragma once

#include "core/cuda/dev.cuh"
#include "sparse24/layout.h"

namespace lissom::sparse24 {

constexpr int kPackThreads = 256;
constexpr int kPackWarps = kPackThreads / 32;

// Canonical W [n, k]. Values are addressed by quads: the pair of one quad is one access.
template <int Bytes>
struct CanonicalView {
  using Kept = dev::Vec<unsigned char, 2 * Bytes>;
  const Kept* values;
  const uint8_t* meta;
  int64_t n, k;

  LISSOM_DEVICE bool inside(int64_t row, int64_t quad) const { return row < n && quad < k / 4; }
  LISSOM_DEVICE uint32_t nibble(int64_t row, int64_t quad) const {
    return dev::load(meta + row * meta_columns(k) + quad / 2) >> (4 * (quad % 2)) & 15u;
  }
  // What a register of a fragment keeps from `quad` on: one quad, of int8 two. Zero outside of W. An illegal nibble makes its
  // values NaN (int8: zero), so that an unchecked mistake is seen and never reaches the matrix unit.
  LISSOM_DEVICE uint32_t kept(int64_t row, int64_t quad) const {
    uint32_t bits = 0;
    LISSOM_UNROLL for (int i = 0; i < 2 / Bytes; ++i) {
      if (!inside(row, quad + i)) continue;
      uint32_t pair = 0;
      const Kept found = dev::load(values + row * (k / 4) + quad + i);
      memcpy(&pair, &found, sizeof found);
      if (!legal_nibble(nibble(row, quad + i))) pair = Bytes == 2 ? 0x7fff7fffu : 0;
      bits |= pair << (16 * i);
    }
    return bits;
  }
  // Four nibbles from `quad` on, legal ones all.
  LISSOM_DEVICE uint32_t nibbles(int64_t row, int64_t quad) const {
    uint32_t bits = 0;
    LISSOM_UNROLL for (int i = 0; i < 4; ++i) {
      const uint32_t found = inside(row, quad + i) ? nibble(row, quad + i) : kFillerNibble;
      bits |= (legal_nibble(found) ? found : kFillerNibble) << (4 * i);
    }
    return bits;
  }
};

// The header, and the bytes behind the records that tell the type by their number.
LISSOM_DEVICE void store_ends(unsigned char* packed, const PackedHeader& header) {
  uint32_t words[sm80::kHeaderBytes / 4] = {};
  memcpy(words, &header, sizeof header);
  LISSOM_UNROLL for (int i = 0; i < sm80::kHeaderBytes / 4; ++i)
      dev::store(reinterpret_cast<uint32_t*>(packed) + i, words[i]);
  for (int64_t at = sm80::packed_bytes(header.n, header.k, sm80::element_bytes(header.dtype));
       at < sm80::buffer_bytes(header.n, header.k, header.dtype); at += 4)
    dev::store(reinterpret_cast<uint32_t*>(packed + at), 0u);
}

template <int Bytes>
LISSOM_KERNEL(kPackThreads, 1)
pack_kernel(CanonicalView<Bytes> w, unsigned char* packed, PackedHeader header) {
  using Registers = dev::Vec<uint32_t, 4>;
  const int64_t across = sm80::records(w.k, Bytes),
                index = static_cast<int64_t>(dev::block_x()) * kPackWarps + dev::warp();
  if (index == 0 && dev::lane() == 0) store_ends(packed, header);
  if (index >= sm80::panels(w.n) * across) return;
  const int64_t row0 = index / across * sm80::kPanelRows,
                quad0 = index % across * sm80::record_columns(Bytes) / 4;
  unsigned char* const record = packed + sm80::kHeaderBytes + index * sm80::record_bytes(Bytes);
  const int g = dev::lane() / 4, t = dev::lane() % 4;

  auto* const words = reinterpret_cast<uint32_t*>(record) + dev::lane();
  if constexpr (Bytes == 2) {
    const int64_t row = row0 + 16 * (t / 2) + g, quad = quad0 + 4 * (t % 2);
    dev::store(words, w.nibbles(row, quad) | w.nibbles(row + 8, quad) << 16);
  } else {
    LISSOM_UNROLL for (int f = 0; f < 2; ++f) {
      const int64_t row = row0 + 16 * f + 8 * (t % 2) + g, quad = quad0 + 8 * (t / 2);
      dev::store(words + 32 * f, w.nibbles(row, quad) | w.nibbles(row, quad + 4) << 16);
    }
  }
  LISSOM_UNROLL for (int f = 0; f < 2; ++f) {
    Registers fragment;
    LISSOM_UNROLL for (int r = 0; r < 4; ++r) fragment[r] =
        w.kept(row0 + 16 * f + 8 * (r % 2) + g, quad0 + (4 * t + 16 * (r / 2)) / (2 * Bytes));
    dev::store(reinterpret_cast<Registers*>(record + sm80::meta_bytes(Bytes) + f * sm80::kFragmentBytes) +
                   dev::lane(),
               fragment);
  }
}

template <int Bytes>
LISSOM_KERNEL(kPackThreads, 1)
unpack_kernel(const unsigned char* packed, typename CanonicalView<Bytes>::Kept* values, uint8_t* meta,
              int64_t n, int64_t k) {
  using Kept = typename CanonicalView<Bytes>::Kept;
  constexpr int kQuads = sm80::kStepBytes / Bytes / 4;  // of a record
  const int64_t row = static_cast<int64_t>(dev::block_x()) * kPackWarps + dev::warp(), quads = k / 4;
  if (row >= n) return;
  for (int64_t first = 0; first < quads; first += 32) {
    const int64_t q = first + dev::lane();
    uint32_t nibble = 0;
    if (q < quads) {
      const unsigned char* record = packed + sm80::record_offset(row, 4 * q, k, Bytes);
      const int r = static_cast<int>(row % sm80::kPanelRows), at = static_cast<int>(q % kQuads);
      dev::store(values + row * quads + q,
                 dev::load(reinterpret_cast<const Kept*>(record + sm80::value_offset(r, at, 0, Bytes))));
      nibble = dev::load(reinterpret_cast<const uint32_t*>(record + sm80::meta_offset(r, at, Bytes))) >>
                   sm80::meta_shift(r, at, Bytes) &
               15u;
    }
    const uint32_t next = dev::shuffle_down(nibble, 1);
    if (q < quads && dev::lane() % 2 == 0)
      dev::store(meta + row * meta_columns(k) + q / 2, static_cast<uint8_t>(nibble | next << 4));
  }
}

}  // namespace lissom::sparse24
