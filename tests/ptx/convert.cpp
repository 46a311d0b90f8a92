// SPDX-License-Identifier: Apache-2.0
// cvt, exact in all forms up to 8-bit floats.
#include <algorithm>
#include <limits>

#include "decode.h"

namespace lissom::ptx {
namespace {

struct Modes {
  Type to, from;
  Round round = Round::even;
  bool to_whole = false;  // .rni and its kin
  bool ftz = false, sat = false, satfinite = false, relu = false;
};

double read_float(const Modes& m, uint64_t bits) {
  if (m.from.width == 64) return double_of(bits);
  const double x = decode(m.from.format(), m.from.kind == Type::tf ? bits >> 13 : bits);
  return m.ftz && m.from == Type{Type::f, 32} ? flush(kF32, x) : x;
}

uint64_t write_float(const Modes& m, double x) {
  if (m.sat) x = std::isnan(x) ? 0 : std::clamp(x, 0.0, 1.0) + 0.0;
  if (m.relu && x <= 0) x = 0;
  if (m.to.width == 64) return bits_of(x);
  const Format& f = m.to.format();
  uint64_t bits = encode(f, x, m.round, m.satfinite);
  if (m.ftz && m.to == Type{Type::f, 32}) bits = encode(f, flush(f, decode(f, bits)));
  return m.to.kind == Type::tf ? bits << 13 : bits;
}

double to_whole(Round mode, double x) {
  switch (mode) {
    case Round::zero: return std::trunc(x);
    case Round::down: return std::floor(x);
    case Round::up: return std::ceil(x);
    default: return std::nearbyint(x);  // the host rounds to nearest even
  }
}

// Saturates; NaN becomes 0, or the top bit alone where f64 or a 64-bit integer takes part.
uint64_t float_to_integer(const Modes& m, double x) {
  const int bits = m.to.width;
  const bool s = m.to.kind == Type::signed_;
  const uint64_t mask = bits == 64 ? ~0ull : (1ull << bits) - 1;
  if (std::isnan(x)) return m.from.width == 64 || bits == 64 ? 1ull << (bits - 1) : 0;
  x = to_whole(m.round, x);
  const double top = std::ldexp(1.0, s ? bits - 1 : bits);
  if (x >= top) return s ? mask >> 1 : mask;
  if (s && x < -top) return (mask >> 1) + 1;
  if (!s && x < 0) return 0;
  return static_cast<uint64_t>(s ? static_cast<int64_t>(x) : static_cast<int64_t>(static_cast<uint64_t>(x))) &
         mask;
}

int64_t sign_extend(uint64_t bits, int width) {
  return static_cast<int64_t>(bits << (64 - width)) >> (64 - width);
}

uint64_t integer_to_float(const Modes& m, uint64_t bits) {
  const int64_t v = sign_extend(bits, m.from.width);
  const bool negative = m.from.kind == Type::signed_ && v < 0;
  const uint64_t magnitude = negative ? ~static_cast<uint64_t>(v) + 1 : bits;
  if (m.to.width == 64)  // to nearest: the compiler's own conversion
    return bits_of(negative ? static_cast<double>(v) : static_cast<double>(magnitude));
  return write_float(m, integer_odd(magnitude, negative));
}

uint64_t integer_to_integer(const Modes& m, uint64_t bits) {
  const uint64_t mask = m.to.width == 64 ? ~0ull : (1ull << m.to.width) - 1;
  const bool from_s = m.from.kind == Type::signed_, to_s = m.to.kind == Type::signed_;
  __int128 v = from_s ? static_cast<__int128>(sign_extend(bits, m.from.width)) : static_cast<__int128>(bits);
  if (m.sat) {
    const __int128 low = to_s ? -(static_cast<__int128>(1) << (m.to.width - 1)) : 0;
    const __int128 high = (static_cast<__int128>(1) << (m.to.width - to_s)) - 1;
    v = v < low ? low : v > high ? high : v;
  }
  return static_cast<uint64_t>(v) & mask;
}

uint64_t convert(const Modes& m, uint64_t bits) {
  const bool from_float = m.from.floating(), to_float = m.to.floating();
  if (!from_float) return to_float ? integer_to_float(m, bits) : integer_to_integer(m, bits);
  double x = read_float(m, bits);
  if (!to_float) return float_to_integer(m, x);
  if (m.to_whole) {
    x = to_whole(m.round, x);
    return write_float({m.to, m.from, Round::even, false, m.ftz, m.sat, false, false}, x);
  }
  return write_float(m, x);
}

void take_rounding(Decoder& d, Modes& m) {
  const auto name = d.any_of({"rn", "rz", "rm", "rp", "rna", "rni", "rzi", "rmi", "rpi"});
  if (name.empty()) return;
  m.to_whole = name.size() == 3 && name[2] == 'i';
  m.round = name == "rna"    ? Round::away
            : name[1] == 'z' ? Round::zero
            : name[1] == 'm' ? Round::down
            : name[1] == 'p' ? Round::up
                             : Round::even;
}

// d = {high, low} from two floats, or element by element between packed types.
void packed(Decoder& d, const Modes& m) {
  const Type single{m.to.kind, m.to.width};
  if (m.from.count == 1) {
    const int to = d.destination(m.to), high = d.source(m.from), low = d.source(m.from);
    d.instruction.op = [=](Warp& w) {
      Modes one = m;
      one.to = single;
      w.each([&](int l) {
        w.at(to, l) = convert(one, w.at(high, l)) << m.to.width | convert(one, w.at(low, l));
      });
    };
    return;
  }
  const int to = d.destination(m.to), a = d.source(m.from);
  d.instruction.op = [=](Warp& w) {
    Modes one = m;
    one.to = single;
    one.from = {m.from.kind, m.from.width};
    const uint64_t mask = (1ull << m.from.width) - 1;
    w.each([&](int l) {
      const uint64_t x = w.at(a, l);
      w.at(to, l) = convert(one, x >> m.from.width) << m.to.width | convert(one, x & mask);
    });
  };
}

void cvt(Decoder& d) {
  Modes m;
  take_rounding(d, m);
  m.ftz = d.flag("ftz");
  m.satfinite = d.flag("satfinite");
  m.sat = d.flag("sat");
  m.relu = d.flag("relu");
  m.to = d.type();
  m.from = d.type();
  if (m.to == kPredicate || m.from == kPredicate || m.to.kind == Type::bits || m.from.kind == Type::bits)
    d.fail("cvt needs numbers");
  const bool eight = m.to.kind == Type::e4m3 || m.to.kind == Type::e5m2;
  if (eight && !m.satfinite) d.fail("8-bit floats need .satfinite");
  if (m.to.count == 2) return packed(d, m);
  if (m.from.count == 2) d.fail("a packed source needs a packed destination");
  if (m.from.floating() && m.to.width == 64 && m.to.kind == Type::f && m.round != Round::even && !m.to_whole)
    d.fail("widening needs no rounding");
  if (!m.from.floating() && m.to.width == 64 && m.to.floating() && m.round != Round::even)
    d.fail("only .rn is supported for integer to f64");
  if (m.from.floating() && m.to.integer() && !m.to_whole)
    d.fail("float to integer needs .rni, .rzi, .rmi or .rpi");
  const int wide = std::max(d.width_of(d.peek()), m.to.width);
  const int to = d.destination_at_least(m.to), a = d.source_at_least(m.from);
  const uint64_t in = m.from.width == 64 ? ~0ull : (1ull << m.from.width) - 1;
  const bool extend = m.to.kind == Type::signed_;  // into a wider register
  const uint64_t out = wide == 64 ? ~0ull : (1ull << wide) - 1;
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const uint64_t r = convert(m, w.at(a, l) & in);
      w.at(to, l) = extend ? static_cast<uint64_t>(sign_extend(r, m.to.width)) & out : r;
    });
  };
}

// szext, bmsk: rare, integer only.
void szext(Decoder& d) {
  const bool clamp = d.one_of({"clamp", "wrap"}) == "clamp";
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(kU32);
  const bool s = t.kind == Type::signed_;
  map2<uint32_t, uint32_t, uint32_t>(d, to, a, b, [=](uint32_t x, uint32_t n) {
    n = clamp ? std::min(n, 32u) : n & 31;
    if (n == 32) return x;
    if (n == 0) return 0u;
    const uint32_t cut = x & ((1u << n) - 1);
    return s && cut >> (n - 1) & 1 ? cut | ~0u << n : cut;
  });
}
void bmsk(Decoder& d) {
  const bool clamp = d.one_of({"clamp", "wrap"}) == "clamp";
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t);
  map2<uint32_t, uint32_t, uint32_t>(d, to, a, b, [=](uint32_t from, uint32_t count) {
    from = clamp ? std::min(from, 32u) : from & 31;
    count = clamp ? std::min(count, 32u) : count & 31;
    return static_cast<uint32_t>(((1ull << count) - 1) << from);
  });
}

}  // namespace

void add_convert(Table& t) {
  t["cvt"] = cvt;
  t["szext"] = szext;
  t["bmsk"] = bmsk;
}

}  // namespace lissom::ptx
