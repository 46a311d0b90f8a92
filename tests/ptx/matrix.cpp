// SPDX-License-Identifier: Apache-2.0
// ldmatrix, mma.sync and mma.sp. Lane l is g = l / 4, t = l % 4; a register holds E = 32 / bits elements, e counts them from the
// low end. With that all shapes of m16n8 share one map:
//
//     A[r] = (row g + 8 (r & 1), column E t + e + 4 E (r >> 1))   B[r] = (k = E t + e + 4 E r, n = g)
//     C, D of 32 bits [r] = (g + 8 (r >> 1), 2t + (r & 1))        of 16 bits [r] = (g + 8 r, 2t + e)
//
// A sparse A has the map of the compressed matrix. Its metadata nibble p0 | p1 << 2 of dense columns 4q .. 4q+3:
//     16-bit elements, k32: word of lane t = 2f + q / 4, k16: of lane t = f; bits 16 (row / 8) + 4 (q % 4)
//     8-bit elements,  k64: word of lane t = 2 (q / 8) + row / 8, k32: 2f + row / 8; bits 4 (q % 8)
// Sums are taken in double and rounded once; what a tensor core rounds in between is not modelled.
#include <algorithm>
#include <cstring>
#include <limits>

#include "decode.h"

namespace lissom::ptx {
namespace {

void require_whole_warp(const Warp& w) {
  if (w.active != kAllLanes) fault("lanes %08x only: the whole warp must take part", w.active);
}

void ldmatrix(Decoder& d) {
  d.one_of({"sync"});
  d.one_of({"aligned"});
  d.one_of({"m8n8"});
  const int count = d.one_of({"x1", "x2", "x4"})[1] - '0';
  const bool trans = d.flag("trans");
  const Space space = d.any_of({"shared", "shared::cta"}).empty() ? Space::generic : Space::shared;
  d.one_of({"b16"});
  const std::vector<int> to = d.destinations(kB32, count);
  const Address from = d.address();
  d.instruction.flow = Instruction::Flow::collective;
  d.instruction.op = [=](Warp& w) {
    require_whole_warp(w);
    uint64_t rows[kLanes];
    for (int l = 0; l < 8 * count; ++l) {
      rows[l] = from.of(w, l);
      if (rows[l] % 16) fault("lane %d: the address of a matrix row is not a multiple of 16", l);
    }
    uint32_t result[4][kLanes];
    for (int l = 0; l < kLanes; ++l) {
      const int g = l / 4, t = l % 4;
      for (int i = 0; i < count; ++i) {
        const uint64_t* row = rows + 8 * i;
        if (!trans) {
          std::memcpy(&result[i][l], w.block.read(w, l, space, row[g] + 4 * t, 4), 4);
        } else {
          uint16_t low, high;
          std::memcpy(&low, w.block.read(w, l, space, row[2 * t] + 2 * g, 2), 2);
          std::memcpy(&high, w.block.read(w, l, space, row[2 * t + 1] + 2 * g, 2), 2);
          result[i][l] = low | static_cast<uint32_t>(high) << 16;
        }
      }
    }
    for (int i = 0; i < count; ++i)
      for (int l = 0; l < kLanes; ++l) w.at(to[i], l) = result[i][l];
  };
}

struct Shape {
  int k;
  Type a, b, c, d;
  bool sparse, ordered, satfinite;
  int selector = 0;
  int per() const { return 32 / a.width; }
  int columns() const { return sparse ? k / 2 : k; }  // of A as stored
  int registers_a() const { return 16 * columns() / (32 * per()); }
  int registers_b() const { return k * 8 / (32 * per()); }
  static int registers_c(Type t) { return t.width == 16 ? 2 : 4; }
};

bool known(const Shape& s) {
  const bool half = s.a.width == 16, byte = s.a.width == 8, tf = s.a.kind == Type::tf;
  const bool integers = s.a.integer();
  const bool f32 = s.c == Type{Type::f, 32} && s.d == s.c, f16 = s.c == Type{Type::f, 16} && s.d == s.c;
  const bool types =
      integers ? byte && s.b.integer() && s.b.width == 8 && s.c == Type{Type::signed_, 32} && s.d == s.c
               : (half || byte || tf) && s.b.floating() && s.b.width == s.a.width && (byte || s.a == s.b) &&
                     (f32 || (f16 && s.a == Type{Type::f, 16}));
  const auto among = [&](std::initializer_list<int> ks) {
    return std::find(ks.begin(), ks.end(), s.k) != ks.end();
  };
  if (!types || (s.satfinite && !integers)) return false;
  if (!s.sparse) return half ? among({8, 16}) : byte ? among({16, 32}) : among({4, 8});
  if (tf) return false;
  const int choices = half ? (s.k == 16 ? 4 : 2) : (s.k == 32 ? 2 : 1);
  return s.selector < choices && (half ? among({16, 32}) : integers ? among({32, 64}) : among({64}));
}

// Kept positions (p0, p1) of four dense columns.
std::pair<int, int> kept(Warp& w, const Shape& s, int meta, int row, int quad) {
  const int g = row % 8, high = row / 8, f = s.selector;
  int t, bit;
  if (s.a.width == 16) {
    t = s.k == 32 ? 2 * f + quad / 4 : f;
    bit = 16 * high + 4 * (quad % 4);
  } else {
    t = (s.k == 64 ? 2 * (quad / 8) : 2 * f) + high;
    bit = 4 * (quad % 8);
  }
  const auto nibble = static_cast<int>(w.at(meta, 4 * g + t) >> bit & 15);
  const int first = nibble & 3, second = nibble >> 2;
  if (s.ordered ? first >= second : first == second)
    fault("illegal metadata nibble %x: row %d, dense columns %d to %d, in lane %d", nibble, row, 4 * quad,
          4 * quad + 3, 4 * g + t);
  return {first, second};
}

double element_value(Type t, uint64_t bits) {
  if (t.kind == Type::signed_) return static_cast<int8_t>(bits);
  if (t.integer()) return static_cast<double>(bits);
  if (t.kind == Type::tf) return decode(kTf32, bits >> 13);
  if (t.kind == Type::bf) return float_of(bits << 16);
  static const std::vector<float> kHalf = [] {
    std::vector<float> v(65536);
    for (uint64_t i = 0; i < v.size(); ++i) v[i] = static_cast<float>(decode(kF16, i));
    return v;
  }();
  return t.width == 16 ? kHalf[bits] : decode(t.format(), bits);
}

struct Fragments {
  std::vector<int> d, a, b, c;
  int meta = -1;
};

// Register r of D in lane l.
uint64_t accumulate(const Shape& s, const double (&sum)[16][8], uint64_t c, int l, int r) {
  const int g = l / 4, t = l % 4;
  if (s.d.width == 16) {
    const double* pair = &sum[g + 8 * r][2 * t];
    return encode(kF16, decode(kF16, c >> 16) + pair[1]) << 16 |
           encode(kF16, decode(kF16, c & 0xffff) + pair[0]);
  }
  const double product = sum[g + 8 * (r >> 1)][2 * t + (r & 1)];
  if (!s.d.integer()) return bits_of(static_cast<float>(float_of(c) + product));
  const auto total = static_cast<int64_t>(product) + static_cast<int32_t>(c);
  using Limits = std::numeric_limits<int32_t>;
  return static_cast<uint32_t>(s.satfinite ? std::clamp<int64_t>(total, Limits::min(), Limits::max())
                                           : total);
}

void multiply(Warp& w, const Shape& s, const Fragments& f) {
  const int per = s.per(), columns = s.columns();
  const uint64_t mask = s.a.width == 32 ? 0xffffffff : (1ull << s.a.width) - 1;
  double a[16][64], b[64][8], sum[16][8] = {};
  for (int l = 0; l < kLanes; ++l)
    for (int e = 0; e < per; ++e) {
      const int g = l / 4, t = l % 4;
      for (size_t r = 0; r < f.a.size(); ++r)
        a[g + 8 * (r & 1)][per * t + e + 4 * per * (r >> 1)] =
            element_value(s.a, w.at(f.a[r], l) >> (s.a.width * e) & mask);
      for (size_t r = 0; r < f.b.size(); ++r)
        b[per * t + e + 4 * per * r][g] = element_value(s.b, w.at(f.b[r], l) >> (s.b.width * e) & mask);
    }
  for (int i = 0; i < 16; ++i)
    for (int c = 0; c < columns; ++c) {
      int k = c;
      if (s.sparse) {
        const auto [first, second] = kept(w, s, f.meta, i, c / 2);
        k = c / 2 * 4 + (c % 2 ? second : first);
      }
      for (int j = 0; j < 8; ++j) sum[i][j] += a[i][c] * b[k][j];
    }
  uint64_t result[4][kLanes];  // d may be c in another order
  for (int l = 0; l < kLanes; ++l)
    for (size_t r = 0; r < f.d.size(); ++r)
      result[r][l] = accumulate(s, sum, w.at(f.c[r], l), l, static_cast<int>(r));
  for (int l = 0; l < kLanes; ++l)
    for (size_t r = 0; r < f.d.size(); ++r) w.at(f.d[r], l) = result[r][l];
}

void mma(Decoder& d) {
  Shape s{};
  const auto sparse = d.any_of({"sp", "sp::ordered_metadata"});
  s.sparse = !sparse.empty();
  s.ordered = sparse.size() > 2;
  d.one_of({"sync"});
  d.one_of({"aligned"});
  s.k = std::atoi(d.one_of({"m16n8k4", "m16n8k8", "m16n8k16", "m16n8k32", "m16n8k64"}).data() + 6);
  d.one_of({"row"});
  d.one_of({"col"});
  s.satfinite = d.flag("satfinite");
  s.d = d.type();
  s.a = d.type();
  s.b = d.type();
  s.c = d.type();
  if (!known(s)) d.fail("no matrix instruction of this shape and these types is known");
  Fragments f;
  f.d = d.destinations(kB32, Shape::registers_c(s.d));
  f.a = d.sources(kB32, s.registers_a());
  f.b = d.sources(kB32, s.registers_b());
  f.c = d.sources(kB32, Shape::registers_c(s.c));
  if (s.sparse) {
    f.meta = d.source(kB32);
    s.selector = static_cast<int>(d.immediate());
    if (!known(s)) d.fail("no such sparsity selector for this shape");
  }
  d.instruction.flow = Instruction::Flow::collective;
  d.instruction.op = [s, f](Warp& w) {
    require_whole_warp(w);
    multiply(w, s, f);
  };
}

}  // namespace

void add_matrix(Table& t) {
  t["ldmatrix"] = ldmatrix;
  t["mma"] = mma;
}

}  // namespace lissom::ptx
