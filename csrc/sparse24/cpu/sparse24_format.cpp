// SPDX-License-Identifier: Apache-2.0
// Canonical and packed form: check, compress, decompress, gather, pack, unpack. Scalar: memory-bound, run once per weight.
#include "sparse24/sparse24.h"

namespace lissom::sparse24 {
namespace {

// Dispatches on the element size: values are moved as bit patterns, so NaN payloads and infinities survive.
template <class F>
auto by_size(int64_t bytes, F f) {
  return bytes == 4 ? f(uint32_t{}) : bytes == 2 ? f(uint16_t{}) : f(uint8_t{});
}

// Drops the sign bit: +0 and -0 both become 0, and the order of what is left is the order of magnitudes (NaN largest).
// One byte is int8.
template <class T>
constexpr T magnitude(T bits) {
  if constexpr (sizeof(T) == 1) return bits & 0x80u ? static_cast<T>(-bits) : bits;
  return static_cast<T>(bits << 1);
}

template <class T>
uint32_t nonzero_mask(const T* quad) {
  uint32_t mask = 0;
  for (int i = 0; i < 4; ++i) mask |= static_cast<uint32_t>(magnitude(quad[i]) != 0) << i;
  return mask;
}

template <class T>
uint32_t largest_two(const T* quad) {
  int first = 0;
  for (int i = 1; i < 4; ++i)
    if (magnitude(quad[i]) > magnitude(quad[first])) first = i;
  int second = first == 0 ? 1 : 0;
  for (int i = 0; i < 4; ++i)
    if (i != first && magnitude(quad[i]) > magnitude(quad[second])) second = i;
  return 1u << first | 1u << second;
}

uint32_t nibble_at(const uint8_t* meta_row, int64_t quad) {
  return (meta_row[quad / 2] >> (4 * (quad % 2))) & 15u;
}

// Of the rows of a panel; zero for those behind N.
void sum_rows(const Canonical& int8, int64_t panel, uint8_t* out) {
  for (int64_t r = 0; r < kPanelRows; ++r) {
    const int64_t n = panel * kPanelRows + r;
    int32_t sum = 0;
    const int8_t* kept = static_cast<const int8_t*>(int8.values) + n * (int8.k / 2);
    for (int64_t i = 0; n < int8.n && i < int8.k / 2; ++i) sum += kept[i];
    memcpy(out + 4 * r, &sum, 4);
  }
}

}  // namespace

BadQuad check_rows(const void* w, int64_t k, int64_t bytes, int64_t begin, int64_t end) {
  return by_size(bytes, [&](auto zero) -> BadQuad {
    using T = decltype(zero);
    for (int64_t n = begin; n < end; ++n) {
      const T* row = static_cast<const T*>(w) + n * k;
      for (int64_t q = 0; q < k / 4; ++q) {
        const int found = __builtin_popcount(nonzero_mask(row + 4 * q));
        if (found > 2) return {n, q, found};
      }
    }
    return {-1, -1, 0};
  });
}

BadQuad check_meta_rows(const uint8_t* meta, int64_t k, int64_t begin, int64_t end) {
  const int64_t columns = meta_columns(k);
  for (int64_t n = begin; n < end; ++n) {
    const uint8_t* row = meta + n * columns;
    for (int64_t q = 0; q < k / 4; ++q)
      if (!legal_nibble(nibble_at(row, q))) return {n, q, static_cast<int>(nibble_at(row, q))};
    if (k % 8 != 0 && nibble_at(row, k / 4) != 0) return {n, k / 4, static_cast<int>(nibble_at(row, k / 4))};
  }
  return {-1, -1, 0};
}

void compress_rows(const void* w, const Canonical& out, bool keep_largest, int64_t begin, int64_t end) {
  if (out.k == 0) return;  // an empty tensor has no address
  by_size(out.bytes, [&](auto zero) {
    using T = decltype(zero);
    const int64_t columns = meta_columns(out.k);
    for (int64_t n = begin; n < end; ++n) {
      const T* row = static_cast<const T*>(w) + n * out.k;
      T* values = static_cast<T*>(out.values) + n * (out.k / 2);
      uint8_t* meta = out.meta + n * columns;
      memset(meta, 0, static_cast<size_t>(columns));
      for (int64_t q = 0; q < out.k / 4; ++q) {
        const T* quad = row + 4 * q;
        uint32_t mask = nonzero_mask(quad);
        if (keep_largest && __builtin_popcount(mask) > 2) mask = largest_two(quad);
        const uint32_t nibble = nibble_of(mask);
        for (int s = 0; s < 2; ++s) {
          const T v = quad[(nibble >> (2 * s)) & 3u];
          values[2 * q + s] = magnitude(v) != 0 ? v : T{0};
        }
        meta[q / 2] = static_cast<uint8_t>(meta[q / 2] | nibble << (4 * (q % 2)));
      }
    }
  });
}

void decompress_rows(const Canonical& in, void* w, int64_t begin, int64_t end) {
  by_size(in.bytes, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t n = begin; n < end; ++n) {
      const T* values = static_cast<const T*>(in.values) + n * (in.k / 2);
      const uint8_t* meta = in.meta + n * meta_columns(in.k);
      T* row = static_cast<T*>(w) + n * in.k;
      for (int64_t q = 0; q < in.k / 4; ++q) {
        const uint32_t nibble = nibble_at(meta, q);
        T quad[4] = {0, 0, 0, 0};
        quad[nibble & 3u] = values[2 * q];
        quad[nibble >> 2] = values[2 * q + 1];
        memcpy(row + 4 * q, quad, sizeof quad);
      }
    }
  });
}

void gather_rows(const void* dense, const Canonical& out, int64_t first, int64_t begin, int64_t end) {
  by_size(out.bytes, [&](auto zero) {
    using T = decltype(zero);
    for (int64_t n = begin; n < end; ++n) {
      const T* row = static_cast<const T*>(dense) + (n - first) * out.k;
      const uint8_t* meta = out.meta + n * meta_columns(out.k);
      T* values = static_cast<T*>(out.values) + n * (out.k / 2);
      for (int64_t q = 0; q < out.k / 4; ++q) {
        const uint32_t nibble = nibble_at(meta, q);
        values[2 * q] = row[4 * q + (nibble & 3u)];
        values[2 * q + 1] = row[4 * q + (nibble >> 2)];
      }
    }
  });
}

void pack_panels(const Canonical& in, DType dtype, uint8_t* records_out, int64_t begin, int64_t end) {
  by_size(in.bytes, [&](auto zero) {
    using T = decltype(zero);
    const int64_t quads = in.k / 4;
    for (int64_t p = begin; p < end; ++p) {
      uint8_t* const panel = records_out + p * panel_bytes(in.k, dtype);
      if (dtype == DType::i8) sum_rows(in, p, panel);
      for (int64_t j = 0; j < records(in.k); ++j) {
        uint8_t* record = panel + panel_head_bytes(dtype) + j * record_bytes(dtype);
        memset(record, 0, static_cast<size_t>(record_bytes(dtype)));
        for (int64_t r = 0; r < kPanelRows; ++r) {
          const int64_t n = p * kPanelRows + r;
          uint32_t word = 0;
          for (int64_t i = 0; i < kRecordQuads; ++i) {
            const int64_t q = j * kRecordQuads + i;
            const bool inside = n < in.n && q < quads;
            const uint32_t nibble = inside ? nibble_at(in.meta + n * meta_columns(in.k), q) : kFillerNibble;
            word |= nibble << (4 * i);
            if (!inside) continue;
            const T* pair = static_cast<const T*>(in.values) + n * (in.k / 2) + 2 * q;
            for (int64_t s = 0; s < 2; ++s)
              memcpy(record + value_offset(r, i, s, dtype), pair + s, sizeof(T));
          }
          memcpy(record + 4 * r, &word, 4);
        }
      }
    }
  });
}

void unpack_panels(const uint8_t* records_in, DType dtype, const Canonical& out, int64_t begin, int64_t end) {
  if (out.k == 0) return;
  by_size(out.bytes, [&](auto zero) {
    using T = decltype(zero);
    const int64_t quads = out.k / 4;
    const int64_t columns = meta_columns(out.k);
    for (int64_t n = begin * kPanelRows; n < end * kPanelRows && n < out.n; ++n) {
      const uint8_t* panel =
          records_in + n / kPanelRows * panel_bytes(out.k, dtype) + panel_head_bytes(dtype);
      const int64_t r = n % kPanelRows;
      uint8_t* meta = out.meta + n * columns;
      memset(meta, 0, static_cast<size_t>(columns));
      for (int64_t q = 0; q < quads; ++q) {
        const uint8_t* record = panel + q / kRecordQuads * record_bytes(dtype);
        const int64_t i = q % kRecordQuads;
        uint32_t word;
        memcpy(&word, record + 4 * r, 4);
        meta[q / 2] = static_cast<uint8_t>(meta[q / 2] | ((word >> (4 * i)) & 15u) << (4 * (q % 2)));
        T* pair = static_cast<T*>(out.values) + n * (out.k / 2) + 2 * q;
        for (int64_t s = 0; s < 2; ++s) memcpy(pair + s, record + value_offset(r, i, s, dtype), sizeof(T));
      }
    }
  });
}

void pack_sm80(const Canonical& in, uint8_t* packed, int64_t begin, int64_t end) {
  const int64_t bytes = in.bytes, columns = sm80::record_columns(bytes), quads = in.k / 4;
  for (int64_t n = begin * sm80::kPanelRows; n < end * sm80::kPanelRows; ++n) {
    const int64_t r = n % sm80::kPanelRows;
    for (int64_t first = 0; first < sm80::records(in.k, bytes) * columns; first += columns) {
      uint8_t* const record = packed + sm80::record_offset(n, first, in.k, bytes);
      if (r == 0) memset(record, 0, static_cast<size_t>(sm80::record_bytes(bytes)));
      for (int64_t i = 0; i < columns / 4; ++i) {
        const int64_t q = first / 4 + i;
        const bool inside = n < in.n && q < quads;
        const uint32_t nibble = inside ? nibble_at(in.meta + n * meta_columns(in.k), q) : kFillerNibble;
        uint8_t* const place = record + sm80::meta_offset(r, i, bytes);
        uint32_t word;
        memcpy(&word, place, 4);
        word |= nibble << sm80::meta_shift(r, i, bytes);
        memcpy(place, &word, 4);
        if (!inside) continue;
        const auto* pair = static_cast<const uint8_t*>(in.values) + (n * (in.k / 2) + 2 * q) * bytes;
        memcpy(record + sm80::value_offset(r, i, 0, bytes), pair, static_cast<size_t>(2 * bytes));
      }
    }
  }
}

void unpack_sm80(const uint8_t* packed, const Canonical& out, int64_t begin, int64_t end) {
  const int64_t bytes = out.bytes, quads_of_record = sm80::record_columns(bytes) / 4;
  for (int64_t n = begin * sm80::kPanelRows; n < end * sm80::kPanelRows && n < out.n; ++n) {
    const int64_t r = n % sm80::kPanelRows;
    uint8_t* const meta = out.meta + n * meta_columns(out.k);
    for (int64_t q = 0; q < out.k / 4; ++q) {
      const uint8_t* const record = packed + sm80::record_offset(n, 4 * q, out.k, bytes);
      const int64_t i = q % quads_of_record;
      uint32_t word;
      memcpy(&word, record + sm80::meta_offset(r, i, bytes), 4);
      const uint32_t nibble = word >> sm80::meta_shift(r, i, bytes) & 15u;
      meta[q / 2] = static_cast<uint8_t>(q % 2 ? meta[q / 2] | nibble << 4 : nibble);
      auto* pair = static_cast<uint8_t*>(out.values) + (n * (out.k / 2) + 2 * q) * bytes;
      memcpy(pair, record + sm80::value_offset(r, i, 0, bytes), static_cast<size_t>(2 * bytes));
    }
  }
}

}  // namespace lissom::sparse24
