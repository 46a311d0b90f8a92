// SPDX-License-Identifier: Apache-2.0
// The forms of a 2:4 weight W [N, K], in one picture. Index maths only: usable on host and device.
//
// Canonical (memory interchange, disk):
//   values [N, K/2]          the two kept values of quad q of row n at [n, 2q], [n, 2q+1], in order of position
//   meta   [N, ceil(K/8)] u8 one nibble a quad, p0 | p1 << 2 with p0 < p1; even quad in the low nibble; unused nibble 0
//
// Packed "cpu-v1" (a cache, made at load):
//   header 64 B | panel 0 | panel 1 | ...           panel = 16 rows of W, all of K
//   panel       = record 0 | record 1 | ...         record = 16 rows x 32 columns (8 quads)
//                 int8: 64 B in front of record 0, i32 of row r at lane r = sum of the row, all of K
//   record      = 64 B metadata: u32 of row r at lane r, nibble i = quad i
//               | values in 64-byte vectors, lane r = row r:
//                   16-bit types   8 vectors, vector q = the pair of quad q
//                   float         16 vectors, vectors 2q, 2q+1 = first and second value of quad q
//                   int8           4 vectors, vector p = the pair of quad 2p, then the pair of quad 2p+1
//   N is padded to 16 rows and K to 32 columns with zero values and nibble 0xE.
//
// Packed "sm80-v1" (mma.sp of the sm_80 instruction set; 16-bit types, and int8 in brackets):
//   header 128 B | panel 0 | panel 1 | ...          panel = 32 rows of W, all of K; header as above, filled up to a line
//   panel       = record 0 | record 1 | ...         record = 32 rows x 32 [64] columns: 8 [16] quads, one k step of a warp
//   record      = metadata 128 [256] B | fragment of rows 0-15, 512 B | fragment of rows 16-31, 512 B
//                 With g = lane / 4, t = lane % 4, everything lies as the lanes of a warp take it:
//                   fragment   register r of a lane at 16 lane + 4 r: row g + 8 (r % 2), bytes 4 t + 16 (r / 2) .. + 3 of
//                              the 32 bytes that the row keeps, i.e. the pair of quad t + 4 (r / 2) [two pairs]
//                   metadata   u32 of a lane at 4 lane: quads 4 (t % 2) .. + 3 of row 16 (t / 2) + g in bits 0-15 and of
//                              row 16 (t / 2) + g + 8 in bits 16-31: selector 0 for the first fragment, 1 for the second.
//                              These 32 words are those of torch's CUTLASS order for this block.
//                              [for each fragment 32 words: quads 8 (t / 2) .. + 7 of row g + 8 (t % 2)]
//   N is padded to 32 rows and K to two records with zero values and nibble 0xE.
#pragma once

#include "core/types.h"

namespace lissom::sparse24 {

constexpr int64_t kPanelRows = 16;
constexpr int64_t kRecordColumns = 32;
constexpr int64_t kRecordQuads = kRecordColumns / 4;
constexpr int64_t kRecordKept = kRecordColumns / 2;
constexpr int64_t kMetaBytes = 64;  // of one record
constexpr uint32_t kFillerNibble = 0xE;
// Of K in int8: 131070 products of at most 128 * 128 stay inside int32, in any order of summation.
constexpr int64_t kMostInt8Columns = 262140;

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
// Row sums: an instruction that wants unsigned activations adds 128 to them, and 128 sums of W are taken off again.
LISSOM_HOST_DEVICE constexpr int64_t panel_head_bytes(DType t) { return t == DType::i8 ? kPanelRows * 4 : 0; }
LISSOM_HOST_DEVICE constexpr int64_t panel_bytes(int64_t k, DType t) {
  return panel_head_bytes(t) + records(k) * record_bytes(t);
}

// Byte offset, inside a record, of kept value `slot` (0, 1) of quad `q` of row `r`.
LISSOM_HOST_DEVICE constexpr int64_t value_offset(int64_t r, int64_t q, int64_t slot, DType t) {
  return kMetaBytes + r * 4 +
         (t == DType::f32  ? (2 * q + slot) * 64
          : t == DType::i8 ? q / 2 * 64 + q % 2 * 2 + slot
                           : q * 64 + slot * 2);
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

// Packed "sm80-v1". `bytes` is the size of an element: 2 or 1.
namespace sm80 {

constexpr char kMagic[9] = "LISSOM80";
constexpr uint32_t kVersion = 1;
constexpr int64_t kHeaderBytes = 128;  // records begin on a 128-byte line, like the memory that holds them
constexpr int64_t kPanelRows = 32;
constexpr int64_t kFragmentBytes = 512;  // 16 rows of a record
constexpr int64_t kRowBytes = 32;        // kept by one row in a record
constexpr int64_t kStepBytes = 64;       // of a row of x that meet one record

// Size of an element by PackedHeader::dtype; 0: there is no such form.
LISSOM_HOST_DEVICE constexpr int64_t element_bytes(int32_t dtype) {
  return dtype < 1 || dtype >= kTypeCount ? 0 : lissom::element_bytes(static_cast<DType>(dtype));
}
LISSOM_HOST_DEVICE constexpr int64_t record_columns(int64_t bytes) { return kStepBytes / bytes; }
LISSOM_HOST_DEVICE constexpr int64_t meta_bytes(int64_t bytes) { return 256 / bytes; }
LISSOM_HOST_DEVICE constexpr int64_t record_bytes(int64_t bytes) {
  return meta_bytes(bytes) + 2 * kFragmentBytes;
}
LISSOM_HOST_DEVICE constexpr int64_t panels(int64_t n) { return (n + kPanelRows - 1) / kPanelRows; }
LISSOM_HOST_DEVICE constexpr int64_t records(int64_t k, int64_t bytes) {
  const int64_t two = 2 * record_columns(bytes);
  return (k + two - 1) / two * 2;
}
LISSOM_HOST_DEVICE constexpr int64_t packed_bytes(int64_t n, int64_t k, int64_t bytes) {
  return kHeaderBytes + panels(n) * records(k, bytes) * record_bytes(bytes);
}
// The length of the whole vector also tells the type, so that a device's copy can be checked without reading its header.
LISSOM_HOST_DEVICE constexpr int64_t buffer_bytes(int64_t n, int64_t k, int32_t dtype) {
  return packed_bytes(n, k, element_bytes(dtype)) + 16 * dtype;
}
constexpr PackedHeader header(int64_t n, int64_t k, int32_t dtype) {
  return {{'L', 'I', 'S', 'S', 'O', 'M', '8', '0'}, kVersion, dtype, n, k, {}};
}
// Byte offset of the record of row n and column k of W.
LISSOM_HOST_DEVICE constexpr int64_t record_offset(int64_t n, int64_t k, int64_t columns, int64_t bytes) {
  return kHeaderBytes +
         (n / kPanelRows * records(columns, bytes) + k / record_columns(bytes)) * record_bytes(bytes);
}

// Inside a record; row 0 .. 31, quad 0 .. record_columns / 4 - 1, slot 0 or 1.
LISSOM_HOST_DEVICE constexpr int64_t value_offset(int64_t row, int64_t quad, int64_t slot, int64_t bytes) {
  const int64_t kept = (2 * quad + slot) * bytes;  // byte of the row's 32
  const int64_t lane = row % 8 * 4 + kept % 16 / 4, r = row / 8 % 2 + kept / 16 * 2;
  return meta_bytes(bytes) + row / 16 * kFragmentBytes + lane * 16 + r * 4 + kept % 4;
}
// The nibble of a quad: bits shift .. shift + 3 of the u32 at meta_offset.
LISSOM_HOST_DEVICE constexpr int64_t meta_offset(int64_t row, int64_t quad, int64_t bytes) {
  const int64_t g = row % 8, half = row / 8 % 2, f = row / 16;
  return bytes == 2 ? 4 * (4 * g + 2 * f + quad / 4) : 4 * (32 * f + 4 * g + half + quad / 8 * 2);
}
LISSOM_HOST_DEVICE constexpr int meta_shift(int64_t row, int64_t quad, int64_t bytes) {
  return static_cast<int>(bytes == 2 ? row / 8 % 2 * 16 + quad % 4 * 4 : quad % 8 * 4);
}

}  // namespace sm80
}  // namespace lissom::sparse24
