// SPDX-License-Identifier: Apache-2.0
// setp, set, selp, slct, testp.
#include <compare>

#include "decode.h"

namespace lissom::ptx {
namespace {

enum class Order { less, equal, greater, unordered };

template <class T>
Order order_of(T a, T b) {
  return a < b ? Order::less : a > b ? Order::greater : a == b ? Order::equal : Order::unordered;
}

struct Comparison {
  bool when[4];  // by Order
};
Comparison comparison(Decoder& d) {
  const auto name = d.one_of({"eq", "ne", "lt", "le", "gt", "ge", "lo", "ls", "hi", "hs", "equ", "neu", "ltu",
                              "leu", "gtu", "geu", "num", "nan"});
  static const std::map<std::string_view, Comparison> kTable = {
      {"eq", {{false, true, false, false}}}, {"ne", {{true, false, true, false}}},
      {"lt", {{true, false, false, false}}}, {"le", {{true, true, false, false}}},
      {"gt", {{false, false, true, false}}}, {"ge", {{false, true, true, false}}},
      {"lo", {{true, false, false, false}}}, {"ls", {{true, true, false, false}}},
      {"hi", {{false, false, true, false}}}, {"hs", {{false, true, true, false}}},
      {"equ", {{false, true, false, true}}}, {"neu", {{true, false, true, true}}},
      {"ltu", {{true, false, false, true}}}, {"leu", {{true, true, false, true}}},
      {"gtu", {{false, false, true, true}}}, {"geu", {{false, true, true, true}}},
      {"num", {{true, true, true, false}}},  {"nan", {{false, false, false, true}}},
  };
  return kTable.at(name);
}

Order compare(Type t, bool ftz, uint64_t a, uint64_t b) {
  if (t.width == 64 && t.kind == Type::f) return order_of(double_of(a), double_of(b));
  if (t.floating()) {
    const double x = decode(t.format(), a), y = decode(t.format(), b);
    return ftz ? order_of(flush(t.format(), x), flush(t.format(), y)) : order_of(x, y);
  }
  if (t.kind != Type::signed_) return order_of(a, b);
  const int up = 64 - t.width;
  return order_of(static_cast<int64_t>(a << up), static_cast<int64_t>(b << up));
}

struct Test {
  Comparison cmp;
  std::string_view combine;  // "", and, or, xor
  bool ftz;
};
Test test_of(Decoder& d) {
  Test t{};
  t.cmp = comparison(d);
  t.combine = d.any_of({"and", "or", "xor"});
  t.ftz = d.flag("ftz");
  return t;
}
bool combined(std::string_view how, bool x, bool c) {
  return how.empty() ? x : how == "and" ? x && c : how == "or" ? x || c : x != c;
}

void setp(Decoder& d) {
  const Test test = test_of(d);
  const Type t = d.type();
  const auto [p, q] = d.predicate_pair();
  const int a = d.source(t), b = d.source(t);
  const Predicate c = test.combine.empty() ? Predicate{a, false} : d.predicate();
  const int to = p, other = q;
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const bool extra = c.of(w, l);
      if (t.count == 2) {  // p for the low half, q for the high one
        const Type half{t.kind, 16};
        const auto x = [&](int s) {
          return test.cmp.when[static_cast<int>(
              compare(half, test.ftz, w.at(a, l) >> s & 0xffff, w.at(b, l) >> s & 0xffff))];
        };
        const bool low = x(0), high = x(16);
        w.at(to, l) = combined(test.combine, low, extra);
        w.at(other, l) = combined(test.combine, high, extra);
        return;
      }
      const bool x = test.cmp.when[static_cast<int>(compare(t, test.ftz, w.at(a, l), w.at(b, l)))];
      w.at(to, l) = combined(test.combine, x, extra);
      w.at(other, l) = combined(test.combine, !x, extra);
    });
  };
}

// set: all ones or 1.0 for true.
void set(Decoder& d) {
  const Test test = test_of(d);
  const Type result = d.type(), t = d.type();
  const int to = d.destination(result), a = d.source(t), b = d.source(t);
  const Predicate c = test.combine.empty() ? Predicate{a, false} : d.predicate();
  const uint64_t one = !result.floating()   ? (result.width == 64 ? ~0ull : (1ull << result.width) - 1)
                       : result.width == 64 ? bits_of(1.0)
                                            : encode(result.format(), 1);
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      uint64_t r = 0;
      for (int s = 0; s < t.total(); s += t.width) {
        const uint64_t mask = t.width == 64 ? ~0ull : (1ull << t.width) - 1;
        const bool x = test.cmp.when[static_cast<int>(
            compare({t.kind, t.width}, test.ftz, w.at(a, l) >> s & mask, w.at(b, l) >> s & mask))];
        if (combined(test.combine, x, c.of(w, l))) r |= one << s;
      }
      w.at(to, l) = r;
    });
  };
}

void selp(Decoder& d) {
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t);
  const Predicate p = d.predicate();
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) { w.at(to, l) = p.of(w, l) ? w.at(a, l) : w.at(b, l); });
  };
}

void slct(Decoder& d) {
  const bool ftz = d.flag("ftz");
  const Type t = d.type(), by = d.type();
  const int to = d.destination(t), a = d.source(t), b = d.source(t), c = d.source(by);
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const Order o = compare(by, ftz, w.at(c, l), 0);
      w.at(to, l) = o == Order::greater || o == Order::equal ? w.at(a, l) : w.at(b, l);
    });
  };
}

void testp(Decoder& d) {
  const auto what = d.one_of({"finite", "infinite", "number", "notanumber", "normal", "subnormal"});
  const Type t = d.type();
  const int to = d.destination(kPredicate), a = d.source(t);
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const double x = t.width == 64 ? double_of(w.at(a, l)) : float_of(w.at(a, l));
      const double smallest = t.width == 64 ? 0x1p-1022 : 0x1p-126;
      const bool sub = x != 0 && std::fabs(x) < smallest;
      w.at(to, l) = what == "finite"       ? std::isfinite(x)
                    : what == "infinite"   ? std::isinf(x)
                    : what == "number"     ? !std::isnan(x)
                    : what == "notanumber" ? std::isnan(x)
                    : what == "subnormal"  ? sub
                                           : std::isfinite(x) && x != 0 && !sub;
    });
  };
}

}  // namespace

void add_compare(Table& t) {
  t["setp"] = setp;
  t["set"] = set;
  t["selp"] = selp;
  t["slct"] = slct;
  t["testp"] = testp;
}

}  // namespace lissom::ptx
