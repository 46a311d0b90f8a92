// SPDX-License-Identifier: Apache-2.0
// The index maths of csrc/sparse24/layout.h and the conversions of csrc/core/types.h, exhaustively where that is possible.
// Plain C++, no framework: prints the first failure and returns 1.
#include <math.h>
#include <stdio.h>

#include <initializer_list>
#include <set>
#include <vector>

#include "core/types.h"
#include "require.h"
#include "sparse24/layout.h"

using namespace lissom;
using namespace lissom::sparse24;

namespace {

bool nibbles_follow_the_filler_rule() {
  for (uint32_t mask = 0; mask < 16; ++mask) {
    if (__builtin_popcount(mask) > 2) continue;
    // Of all pairs p0 < p1 that hold the set positions, the one with the largest positions.
    int best = -1;
    for (int p0 = 0; p0 < 4; ++p0)
      for (int p1 = p0 + 1; p1 < 4; ++p1)
        if ((mask & ~(1u << p0 | 1u << p1)) == 0 && (best < 0 || p0 + p1 > (best & 3) + (best >> 2)))
          best = p0 | p1 << 2;
    REQUIRE(nibble_of(mask) == static_cast<uint32_t>(best));
  }
  return true;
}

bool legal_nibbles_are_the_increasing_pairs() {
  for (uint32_t nibble = 0; nibble < 16; ++nibble)
    REQUIRE(legal_nibble(nibble) == ((nibble & 3u) < (nibble >> 2)));
  REQUIRE(legal_nibble(kFillerNibble));
  return true;
}

// Every byte of a record behind its metadata belongs to exactly one kept value.
bool record_is_covered_once() {
  for (DType t : {DType::f32, DType::bf16, DType::f16, DType::i8}) {
    std::set<int64_t> used;
    for (int64_t row = 0; row < kPanelRows; ++row)
      for (int64_t quad = 0; quad < kRecordQuads; ++quad)
        for (int64_t slot = 0; slot < 2; ++slot) {
          const int64_t at = value_offset(row, quad, slot, t);
          REQUIRE(at % element_bytes(t) == 0);
          REQUIRE(at >= kMetaBytes && at + element_bytes(t) <= record_bytes(t));
          REQUIRE(used.insert(at).second);
        }
    REQUIRE(static_cast<int64_t>(used.size()) * element_bytes(t) == record_bytes(t) - kMetaBytes);
    REQUIRE(record_bytes(t) % 64 == 0);
  }
  // a 16-bit pair is one 32-bit lane; floats of one slot are one vector
  REQUIRE(value_offset(3, 2, 1, DType::bf16) == value_offset(3, 2, 0, DType::bf16) + 2);
  REQUIRE(value_offset(4, 2, 1, DType::f32) == value_offset(3, 2, 1, DType::f32) + 4);
  // four int8 are one lane: the pairs of two quads
  REQUIRE(value_offset(3, 4, 0, DType::i8) == kMetaBytes + 2 * 64 + 3 * 4);
  REQUIRE(value_offset(3, 5, 1, DType::i8) == value_offset(3, 4, 0, DType::i8) + 3);
  return true;
}

bool sizes() {
  REQUIRE(sizeof(PackedHeader) == 64);
  for (DType t : {DType::f32, DType::bf16, DType::i8}) {
    const int64_t head = t == DType::i8 ? 64 : 0;
    for (int64_t n : {0, 1, 15, 16, 17, 4096}) {
      for (int64_t k : {0, 4, 8, 28, 32, 36, 4096}) {
        REQUIRE(panels(n) * 16 >= n && panels(n) * 16 < n + 16);
        REQUIRE(records(k) * 32 >= k && records(k) * 32 < k + 32);
        REQUIRE(meta_columns(k) * 8 >= k && meta_columns(k) * 8 < k + 8);
        REQUIRE(packed_bytes(n, k, t) == 64 + panels(n) * (head + records(k) * record_bytes(t)));
        REQUIRE(panel_bytes(k, t) % 64 == 0);
      }
    }
  }
  REQUIRE(packed_bytes(4096, 4096, DType::bf16) == 64 + int64_t{4096} * 4096 * 2 * 9 / 16);
  REQUIRE(kMostInt8Columns % 4 == 0 && kMostInt8Columns / 2 * 128 * 128 <= INT32_MAX);
  REQUIRE((kMostInt8Columns + 4) / 2 * 128 * 128 > INT32_MAX);
  REQUIRE(packed_bytes(int64_t{1} << 20, int64_t{1} << 20, DType::f32) > int64_t{1} << 41);
  return true;
}

bool every_half_widens_and_narrows_exactly() {
  for (uint32_t h = 0; h < 65536; ++h) {
    const float b = bf16_to_float(static_cast<uint16_t>(h)), f = f16_to_float(static_cast<uint16_t>(h));
    if (isnan(b))
      REQUIRE(isnan(bf16_to_float(float_to_bf16(b))));
    else
      REQUIRE(float_to_bf16(b) == h);
    const uint32_t exponent = h >> 10 & 31, mantissa = h & 1023;
    if (exponent == 31 && mantissa) {
      REQUIRE(isnan(f) && isnan(f16_to_float(float_to_f16(f))));
      continue;
    }
    const double size = exponent == 31 ? INFINITY
                        : exponent     ? ldexp(1024.0 + mantissa, static_cast<int>(exponent) - 25)
                                       : ldexp(mantissa, -24);
    REQUIRE(fabs(f) == size && signbit(f) == static_cast<bool>(h >> 15));
    REQUIRE(float_to_f16(f) == h);
  }
  return true;
}

// Between neighbours a < b of a 16-bit type: below the middle gives a, above it b, at it the even one.
template <class Narrow, class Widen>
bool rounds_to_nearest_even(uint32_t infinity, Narrow narrow, Widen widen) {
  for (uint32_t h = 0; h + 1 < infinity; ++h) {
    const float a = widen(static_cast<uint16_t>(h)), b = widen(static_cast<uint16_t>(h + 1));
    const float middle = static_cast<float>((static_cast<double>(a) + b) / 2);
    const uint32_t even = h & 1 ? h + 1 : h;
    REQUIRE(narrow(middle) == even);
    REQUIRE(narrow(nextafterf(middle, 0)) == h);
    REQUIRE(narrow(nextafterf(middle, INFINITY)) == h + 1);
    REQUIRE(narrow(-middle) == (even | 0x8000u));
  }
  REQUIRE(narrow(INFINITY) == infinity);
  return true;
}

}  // namespace

int main() {
  const bool ok = nibbles_follow_the_filler_rule() && legal_nibbles_are_the_increasing_pairs() &&
                  record_is_covered_once() && sizes() && every_half_widens_and_narrows_exactly() &&
                  rounds_to_nearest_even(0x7f80, float_to_bf16, bf16_to_float) &&
                  rounds_to_nearest_even(0x7c00, float_to_f16, f16_to_float) &&
                  float_to_f16(65519.996f) == 0x7bff && float_to_f16(65520.0f) == 0x7c00 &&
                  float_to_bf16(3.4e38f) == 0x7f80;
  if (ok) puts("layout: ok");
  return ok ? 0 : 1;
}
