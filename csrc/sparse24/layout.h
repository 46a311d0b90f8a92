// SPDX-License-Identifier: Apache-2.0
// The two forms of a 2:4 weight W [N, K], in one picture. Index maths only: usable on host and device.
//
// Canonical (memory interchange, disk):
//   values [N, K/2]          the two kept values of quad q of row n at [n, 2q], [n, 2q+1], in order of position
//   meta   [N, ceil(K/8)] u8 one nibble a quad, p0 | p1 << 2 with p0 < p1; even quad in the low nibble; unused nibble 0
//
// Packed "cpu-v1" (a cache, made at load):
//   header 64 B | panel 0 | panel 1 | ...           panel = 16 rows of W, all of K
//   panel       = record 0 | record 1 | ...         record = 16 rows x 32 columns (8 quads)
//   record      = 64 B metadata: u32 of row r at lane r, nibble i = quad i
//               | values in 64-byte vectors, lane r = row r:
//                   16-bit types   8 vectors, vector q = the pair of quad q
//                   float         16 vectors, vectors 2q, 2q+1 = first and second value of quad q
//   N is padded to 16 rows and K to 32 columns with zero values and nibble 0xE.
#pragma once

#include "core/types.h"

#if defined(__CUDACC__)
#define LISSOM_HOST_DEVICE __host__ __device__
#else
#define LISSOM_HOST_DEVICE
#endif

namespace lissom::sparse24 {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kRecordColumns = 32;
constexpr int64_t kRecordQuads = kRecordColumns / 4;
constexpr int64_t kRecordKept = kRecordColumns / 2;
constexpr int64_t kMetaBytes = 64;  // of one record
constexpr uint32_t kFillerNibble = 0xE;

// (0,1) (0,2) (1,2) (0,3) (1,3) (2,3)
constexpr uint32_t kLegalNibbles = 1u << 0x4 | 1u << 0x8 | 1u << 0x9 | 1u << 0xC | 1u << 0xD | 1u << 0xE;
LISSOM_HOST_DEVICE constexpr bool legal_nibble(uint32_t nibble) {
  return (kLegalNibbles >> (nibble & 15u)) & 1u;
}

// Nibble that stores a quad in which the positions of `nonzero` (4 bits, at most two set) hold values. The filler
// positions are the largest free ones that keep p0 < p1, so that the canonical form of a matrix is unique.
LISSOM_HOST_DEVICE constexpr uint32_t nibble_of(uint32_t nonzero) {
  switch (nonzero) {
    case 0x1: return 0xC;  // {0} -> (0,3)
    case 0x2: return 0xD;  // {1} -> (1,3)
    case 0x3: return 0x4;
    case 0x5: return 0x8;
    case 0x6: return 0x9;
    case 0x9: return 0xC;
    case 0xA: return 0xD;
    default: return 0xE;  // {}, {2}, {3}, {2,3}
  }
}

LISSOM_HOST_DEVICE constexpr int64_t meta_columns(int64_t k) { return (k + 7) / 8; }
LISSOM_HOST_DEVICE constexpr int64_t panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }
LISSOM_HOST_DEVICE constexpr int64_t records(int64_t k) { return (k + kRecordColumns - 1) / kRecordColumns; }
LISSOM_HOST_DEVICE constexpr int64_t record_bytes(DType t) {
  return kMetaBytes + kPanelRows * kRecordKept * element_bytes(t);
}
LISSOM_HOST_DEVICE constexpr int64_t panel_bytes(int64_t k, DType t) { return records(k) * record_bytes(t); }

// Byte offset, inside a record, of kept value `slot` (0, 1) of quad `q` of row `r`.
LISSOM_HOST_DEVICE constexpr int64_t value_offset(int64_t r, int64_t q, int64_t slot, DType t) {
  return t == DType::f32 ? kMetaBytes + (2 * q + slot) * 64 + r * 4 : kMetaBytes + q * 64 + r * 4 + slot * 2;
}

struct PackedHeader {
  char magic[8];  // "LISSOM24"
  uint32_t version;
  int32_t dtype;  // DType
  int64_t n, k;
  uint8_t reserved[32];
};
static_assert(sizeof(PackedHeader) == 64, "the header keeps the records 64-byte aligned");
constexpr uint32_t kPackedVersion = 1;

LISSOM_HOST_DEVICE constexpr int64_t packed_bytes(int64_t n, int64_t k, DType t) {
  return static_cast<int64_t>(sizeof(PackedHeader)) + panels(n) * panel_bytes(k, t);
}

}  // namespace lissom::sparse24
