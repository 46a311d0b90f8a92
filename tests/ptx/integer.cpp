// SPDX-License-Identifier: Apache-2.0
// Integer and bit operations.
#include <algorithm>
#include <limits>

#include "decode.h"

namespace lissom::ptx {
namespace {

template <class T>
using Unsigned = std::make_unsigned_t<T>;
template <class T>
constexpr int kBits = sizeof(T) * 8;

template <class T>
T wrap_add(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) + static_cast<Unsigned<T>>(b));
}
template <class T>
T wrap_sub(T a, T b) {
  return static_cast<T>(static_cast<Unsigned<T>>(a) - static_cast<Unsigned<T>>(b));
}
template <class T>
T mul_low(T a, T b) {
  return static_cast<T>(static_cast<uint64_t>(a) * static_cast<uint64_t>(b));
}
template <class T>
T mul_high(T a, T b) {
  if constexpr (std::is_signed_v<T>)
    return static_cast<T>(static_cast<__int128>(a) * b >> kBits<T>);
  else
    return static_cast<T>(static_cast<unsigned __int128>(a) * b >> kBits<T>);
}
template <class T>
T clamp_to(int64_t x) {
  return static_cast<T>(std::clamp<int64_t>(x, std::numeric_limits<T>::min(), std::numeric_limits<T>::max()));
}

// f on each element of one or two packed 16-bit integers or on a scalar.
template <class F>
void binary(Decoder& d, Type t, F f) {
  const int to = d.destination(t), a = d.source(t), b = d.source(t);
  if (t.count == 2) {
    with_integer({t.kind, 16}, [&](auto zero) {
      using T = decltype(zero);
      map2<uint32_t, uint32_t, uint32_t>(d, to, a, b, [f](uint32_t x, uint32_t y) {
        const auto low = static_cast<uint16_t>(f(static_cast<T>(x), static_cast<T>(y)));
        const auto high = static_cast<uint16_t>(f(static_cast<T>(x >> 16), static_cast<T>(y >> 16)));
        return static_cast<uint32_t>(high) << 16 | low;
      });
    });
    return;
  }
  with_integer(t, [&](auto zero) {
    using T = decltype(zero);
    map2<T, T, T>(d, to, a, b, f);
  });
}
template <class F>
void unary(Decoder& d, Type t, F f) {
  const int to = d.destination(t), a = d.source(t);
  with_integer(t, [&](auto zero) {
    using T = decltype(zero);
    map1<T, T>(d, to, a, f);
  });
}

// a + b + carry, and the carry out; subtraction is a + ~b + !borrow.
void with_carry(Decoder& d, bool subtract, bool in, bool out) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), bits = t.width;
  d.instruction.op = [=](Warp& w) {
    const uint64_t mask = bits == 64 ? ~0ull : 0xffffffffull;
    w.each([&](int l) {
      const uint64_t y = subtract ? ~w.at(b, l) & mask : w.at(b, l);
      const uint64_t c = in ? w.carry[l] ^ subtract : subtract;
      const auto sum = static_cast<unsigned __int128>(w.at(a, l)) + y + c;
      w.at(to, l) = static_cast<uint64_t>(sum) & mask;
      if (out) w.carry[l] = (static_cast<uint64_t>(sum >> bits) & 1) ^ subtract;
    });
  };
}

void add_or_sub(Decoder& d, bool subtract) {
  if (d.flag("cc")) return with_carry(d, subtract, false, true);
  const bool saturate = d.flag("sat");
  const Type t = d.type();
  if (saturate && t != Type{Type::signed_, 32}) d.fail(".sat needs .s32");
  if (saturate)
    binary(d, t, [subtract](auto a, auto b) {
      return clamp_to<int32_t>(static_cast<int64_t>(a) + (subtract ? -1 : 1) * static_cast<int64_t>(b));
    });
  else
    binary(d, t, [subtract](auto a, auto b) { return subtract ? wrap_sub(a, b) : wrap_add(a, b); });
}

void chain(Decoder& d, bool subtract) { with_carry(d, subtract, true, d.flag("cc")); }

// mul and mad; d is twice as wide in the .wide form.
void multiply(Decoder& d, bool add) {
  const auto part = d.one_of({"lo", "hi", "wide"});
  const bool saturate = d.flag("sat");
  const Type t = d.type();
  Type wide = t;
  if (part == "wide") wide.width *= 2;
  if (saturate && !(add && part == "hi" && t == Type{Type::signed_, 32})) d.fail(".sat needs mad.hi.s32");
  const int to = d.destination(wide), a = d.source(t), b = d.source(t),
            c = add ? d.source(wide) : d.names.literal(0);
  with_integer(t, [&](auto zero) {
    using T = decltype(zero);
    if (part == "lo") {
      map3<T, T, T, T>(d, to, a, b, c, [](T x, T y, T z) { return wrap_add(mul_low(x, y), z); });
    } else if (part == "hi") {
      map3<T, T, T, T>(d, to, a, b, c, [saturate](T x, T y, T z) {
        if (saturate) return clamp_to<T>(static_cast<int64_t>(mul_high(x, y)) + static_cast<int64_t>(z));
        return wrap_add(mul_high(x, y), z);
      });
    } else if constexpr (sizeof(T) == 2 || sizeof(T) == 4) {
      using W = std::conditional_t<sizeof(T) == 2, std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                   std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
      map3<W, T, T, W>(d, to, a, b, c, [](T x, T y, W z) {
        return wrap_add<W>(static_cast<W>(static_cast<W>(x) * static_cast<W>(y)), z);
      });
    } else {
      d.fail(".wide needs 16 or 32 bits");
    }
  });
}

void multiply24(Decoder& d, bool add) {
  const bool high = d.one_of({"lo", "hi"}) == "hi";
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t),
            c = add ? d.source(t) : d.names.literal(0);
  if (t.width != 32) d.fail("mul24 needs 32 bits");
  const bool s = t.kind == Type::signed_;
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(d, to, a, b, c, [=](uint32_t x, uint32_t y, uint32_t z) {
    const auto cut = [s](uint32_t v) {
      return s ? static_cast<int64_t>(static_cast<int32_t>(v << 8) >> 8) : static_cast<int64_t>(v & 0xffffff);
    };
    return static_cast<uint32_t>(cut(x) * cut(y) >> (high ? 16 : 0)) + z;
  });
}

void divide(Decoder& d, bool remainder) {
  binary(d, d.type(), [remainder](auto a, auto b) {
    using T = decltype(a);
    if (b == 0) return static_cast<T>(~T{0});  // unspecified by PTX
    if constexpr (std::is_signed_v<T>)
      if (b == -1) return remainder ? T{0} : wrap_sub(T{0}, a);  // of the lowest number: no trap
    return static_cast<T>(remainder ? a % b : a / b);
  });
}

void extreme(Decoder& d, bool maximum) {
  const bool relu = d.flag("relu");
  const Type t = d.type();
  binary(d, t, [=](auto a, auto b) {
    const auto x = maximum ? std::max(a, b) : std::min(a, b);
    return relu ? std::max<decltype(a)>(x, 0) : x;
  });
}

void sad(Decoder& d) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), c = d.source(t);
  with_integer(t, [&](auto zero) {
    using T = decltype(zero);
    map3<T, T, T, T>(d, to, a, b, c,
                     [](T x, T y, T z) { return wrap_add(z, x < y ? wrap_sub(y, x) : wrap_sub(x, y)); });
  });
}

template <class F>
void logic(Decoder& d, F f) {
  const Type t = d.type();
  if (t != kPredicate) return binary(d, t, [f](auto a, auto b) { return static_cast<decltype(a)>(f(a, b)); });
  const int to = d.destination(t);
  const Predicate a = d.predicate(), b = d.predicate();
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) { w.at(to, l) = f(uint64_t{a.of(w, l)}, uint64_t{b.of(w, l)}) & 1; });
  };
}
void bit_not(Decoder& d) {
  const Type t = d.type();
  if (t != kPredicate) return unary(d, t, [](auto a) { return static_cast<decltype(a)>(~a); });
  const int to = d.destination(t), a = d.source(t);
  map1<uint64_t, uint64_t>(d, to, a, [](uint64_t x) { return ~x & 1; });
}

void shift(Decoder& d, bool left) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(kU32);
  with_integer(t, [&](auto zero) {
    using T = decltype(zero);
    map2<T, T, uint32_t>(d, to, a, b, [left](T x, uint32_t n) {
      if (left)
        return n >= static_cast<uint32_t>(kBits<T>) ? T{0} : static_cast<T>(static_cast<uint64_t>(x) << n);
      if (n >= static_cast<uint32_t>(kBits<T>)) return static_cast<T>(x < 0 ? -1 : 0);
      return static_cast<T>(x >> n);
    });
  });
}

void funnel(Decoder& d) {
  const bool left = d.one_of({"l", "r"}) == "l", clamp = d.one_of({"clamp", "wrap"}) == "clamp";
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), c = d.source(kU32);
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(d, to, a, b, c, [=](uint32_t low, uint32_t high, uint32_t n) {
    n = clamp ? std::min(n, 32u) : n & 31;
    const uint64_t both = static_cast<uint64_t>(high) << 32 | low;
    return static_cast<uint32_t>(left ? both << n >> 32 : both >> n);
  });
}

void field_extract(Decoder& d) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(kU32), c = d.source(kU32);
  const int top = t.width - 1;
  const bool s = t.kind == Type::signed_;
  map3<uint64_t, uint64_t, uint32_t, uint32_t>(d, to, a, b, c, [=](uint64_t x, uint32_t at, uint32_t count) {
    const int pos = at & 0xff, len = count & 0xff;
    const bool sign = s && len && (x >> std::min(pos + len - 1, top) & 1);
    uint64_t y = 0;
    for (int i = 0; i <= top; ++i)
      y |= static_cast<uint64_t>(i < len && pos + i <= top ? x >> (pos + i) & 1 : sign) << i;
    return y;
  });
}

void field_insert(Decoder& d) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), c = d.source(kU32), e = d.source(kU32);
  const int top = t.width - 1;
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const int pos = w.at(c, l) & 0xff, len = w.at(e, l) & 0xff;
      uint64_t y = w.at(b, l);
      for (int i = 0; i < len && pos + i <= top; ++i)
        y = (y & ~(1ull << (pos + i))) | (w.at(a, l) >> i & 1) << (pos + i);
      w.at(to, l) = y;
    });
  };
}

void permute(Decoder& d) {
  const auto mode = d.any_of({"f4e", "b4e", "rc8", "ecl", "ecr", "rc16"});
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), c = d.source(t);
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(d, to, a, b, c,
                                               [mode](uint32_t x, uint32_t y, uint32_t control) {
                                                 const uint64_t both = static_cast<uint64_t>(y) << 32 | x;
                                                 const int n = control & 3;
                                                 uint32_t r = 0;
                                                 for (int i = 0; i < 4; ++i) {
                                                   int from = control >> (4 * i) & 15;
                                                   if (mode == "f4e") from = n + i;
                                                   if (mode == "b4e") from = (n - i) & 7;
                                                   if (mode == "rc8") from = n;
                                                   if (mode == "ecl") from = std::max(i, n);
                                                   if (mode == "ecr") from = std::min(i, n);
                                                   if (mode == "rc16") from = 2 * (n & 1) + (i & 1);
                                                   uint32_t byte = both >> (8 * (from & 7)) & 0xff;
                                                   if (from & 8) byte = byte & 0x80 ? 0xff : 0;
                                                   r |= byte << (8 * i);
                                                 }
                                                 return r;
                                               });
}

void lop3(Decoder& d) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), c = d.source(t);
  const uint64_t table = d.immediate();
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(d, to, a, b, c, [table](uint32_t x, uint32_t y, uint32_t z) {
    uint32_t r = 0;
    for (int i = 0; i < 8; ++i)
      if (table >> i & 1) r |= (i & 4 ? x : ~x) & (i & 2 ? y : ~y) & (i & 1 ? z : ~z);
    return r;
  });
}

// popc, clz, bfind: results are .u32 whatever the operand.
template <class F>
void count(Decoder& d, F f) {
  const Type t = d.type();
  const int to = d.destination(kU32), a = d.source(t);
  const int bits = t.width;
  map1<uint32_t, uint64_t>(d, to, a, [=](uint64_t x) { return static_cast<uint32_t>(f(x, bits)); });
}
void find_bit(Decoder& d) {
  const bool amount = d.flag("shiftamt");
  const Type t = d.type();
  const int to = d.destination(kU32), a = d.source(t);
  const int bits = t.width;
  const bool s = t.kind == Type::signed_;
  map1<uint32_t, uint64_t>(d, to, a, [=](uint64_t x) {
    if (s && x >> (bits - 1) & 1) x = ~x & (bits == 64 ? ~0ull : (1ull << bits) - 1);
    if (x == 0) return kAllLanes;
    const int at = 63 - std::countl_zero(x);
    return static_cast<uint32_t>(amount ? bits - 1 - at : at);
  });
}
void reverse(Decoder& d) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), bits = t.width;
  map1<uint64_t, uint64_t>(d, to, a, [=](uint64_t x) {
    uint64_t y = 0;
    for (int i = 0; i < bits; ++i) y |= (x >> i & 1) << (bits - 1 - i);
    return y;
  });
}

// dp4a, dp2a: products of bytes (and halves) added to c.
void dot(Decoder& d, bool halves) {
  const bool high = halves && d.one_of({"lo", "hi"}) == "hi";
  const Type ta = d.type(), tb = d.type();
  const int to = d.destination(kB32), a = d.source(kB32), b = d.source(kB32), c = d.source(kB32);
  const bool sa = ta.kind == Type::signed_, sb = tb.kind == Type::signed_;
  map3<uint32_t, uint32_t, uint32_t, uint32_t>(d, to, a, b, c, [=](uint32_t x, uint32_t y, uint32_t z) {
    for (int i = 0; i < (halves ? 2 : 4); ++i) {
      const uint32_t u = halves ? x >> (16 * i) & 0xffff : x >> (8 * i) & 0xff;
      const uint32_t v = y >> (8 * (i + 2 * high)) & 0xff;
      const int p = halves ? (sa ? static_cast<int16_t>(u) : static_cast<int>(u))
                           : (sa ? static_cast<int8_t>(u) : static_cast<int>(u));
      z += static_cast<uint32_t>(p * (sb ? static_cast<int8_t>(v) : static_cast<int>(v)));
    }
    return z;
  });
}

}  // namespace

// add, sub, mul, mad, abs, neg, min, max and div also have float forms: floating.cpp calls back here for integers.
void integer_add(Decoder& d) { add_or_sub(d, false); }
void integer_sub(Decoder& d) { add_or_sub(d, true); }
void integer_mul(Decoder& d) { multiply(d, false); }
void integer_mad(Decoder& d) { multiply(d, true); }
void integer_div(Decoder& d) { divide(d, false); }
void integer_min(Decoder& d) { extreme(d, false); }
void integer_max(Decoder& d) { extreme(d, true); }
void integer_abs(Decoder& d) {
  unary(d, d.type(), [](auto a) { return a < 0 ? wrap_sub<decltype(a)>(0, a) : a; });
}
void integer_neg(Decoder& d) {
  unary(d, d.type(), [](auto a) { return wrap_sub<decltype(a)>(0, a); });
}

void add_integer(Table& t) {
  t["addc"] = [](Decoder& d) { chain(d, false); };
  t["subc"] = [](Decoder& d) { chain(d, true); };
  t["mul24"] = [](Decoder& d) { multiply24(d, false); };
  t["mad24"] = [](Decoder& d) { multiply24(d, true); };
  t["rem"] = [](Decoder& d) { divide(d, true); };
  t["sad"] = sad;
  t["and"] = [](Decoder& d) { logic(d, [](auto a, auto b) { return a & b; }); };
  t["or"] = [](Decoder& d) { logic(d, [](auto a, auto b) { return a | b; }); };
  t["xor"] = [](Decoder& d) { logic(d, [](auto a, auto b) { return a ^ b; }); };
  t["not"] = bit_not;
  t["cnot"] = [](Decoder& d) { unary(d, d.type(), [](auto a) { return static_cast<decltype(a)>(a == 0); }); };
  t["shl"] = [](Decoder& d) { shift(d, true); };
  t["shr"] = [](Decoder& d) { shift(d, false); };
  t["shf"] = funnel;
  t["bfe"] = field_extract;
  t["bfi"] = field_insert;
  t["prmt"] = permute;
  t["lop3"] = lop3;
  t["popc"] = [](Decoder& d) { count(d, [](uint64_t x, int) { return std::popcount(x); }); };
  t["clz"] = [](Decoder& d) {
    count(d, [](uint64_t x, int bits) { return std::countl_zero(x) - (64 - bits); });
  };
  t["bfind"] = find_bit;
  t["brev"] = reverse;
  t["dp4a"] = [](Decoder& d) { dot(d, false); };
  t["dp2a"] = [](Decoder& d) { dot(d, true); };
}

}  // namespace lissom::ptx
