// SPDX-License-Identifier: Apache-2.0
// Floating point arithmetic. f32 in rounding to nearest and f64 use the host's; everything else goes through round-to-odd.
#include <algorithm>

#include "decode.h"

namespace lissom::ptx {

void integer_add(Decoder&);
void integer_sub(Decoder&);
void integer_mul(Decoder&);
void integer_mad(Decoder&);
void integer_div(Decoder&);
void integer_min(Decoder&);
void integer_max(Decoder&);
void integer_abs(Decoder&);
void integer_neg(Decoder&);

namespace {

struct Rule {
  int arity;
  double (*odd)(double, double, double);
  float (*f32)(float, float, float);
  double (*f64)(double, double, double);
};
constexpr Rule kAdd{2, [](double a, double b, double) { return add_odd(a, b); },
                    [](float a, float b, float) { return a + b; },
                    [](double a, double b, double) { return a + b; }};
constexpr Rule kSub{2, [](double a, double b, double) { return add_odd(a, -b); },
                    [](float a, float b, float) { return a - b; },
                    [](double a, double b, double) { return a - b; }};
constexpr Rule kMul{2, [](double a, double b, double) { return a * b; },
                    [](float a, float b, float) { return a * b; },
                    [](double a, double b, double) { return a * b; }};
constexpr Rule kFma{3, fma_odd, [](float a, float b, float c) { return std::fma(a, b, c); },
                    [](double a, double b, double c) { return std::fma(a, b, c); }};
constexpr Rule kDiv{2, [](double a, double b, double) { return div_odd(a, b); },
                    [](float a, float b, float) { return a / b; },
                    [](double a, double b, double) { return a / b; }};
constexpr Rule kRcp{1, [](double a, double, double) { return div_odd(1, a); },
                    [](float a, float, float) { return 1 / a; },
                    [](double a, double, double) { return 1 / a; }};
constexpr Rule kSqrt{1, [](double a, double, double) { return sqrt_odd(a); },
                     [](float a, float, float) { return std::sqrt(a); },
                     [](double a, double, double) { return std::sqrt(a); }};

struct Modes {
  Type type;
  Round round = Round::even;
  bool ftz = false, sat = false, relu = false;
};

double finish(const Modes& m, double x) {
  if (m.sat) return std::isnan(x) ? 0 : std::clamp(x, 0.0, 1.0) + 0.0;  // -0 becomes +0
  if (m.relu && !std::isnan(x) && !(x > 0)) return 0;
  return x;
}

uint64_t evaluate(const Rule& rule, const Modes& m, const uint64_t* in) {
  if (m.type.width == 64) return bits_of(rule.f64(double_of(in[0]), double_of(in[1]), double_of(in[2])));
  const Format& f = m.type.format();
  if (m.type.width == 32 && m.round == Round::even && !m.ftz && !m.sat)
    return bits_of(rule.f32(float_of(in[0]), float_of(in[1]), float_of(in[2])));
  double x[3];
  for (int i = 0; i < 3; ++i) {
    x[i] = decode(f, in[i]);
    if (m.ftz) x[i] = flush(f, x[i]);
  }
  const uint64_t bits = encode(f, rule.odd(x[0], x[1], x[2]), m.round);
  if (!m.ftz && !m.sat && !m.relu) return bits;
  double y = decode(f, bits);
  if (m.ftz) y = flush(f, y);
  return encode(f, finish(m, y));
}

// Applies `f(lane inputs)` to each packed element.
template <class F>
void elementwise(Decoder& d, Type t, int arity, F f) {
  const int to = d.destination(t);
  int in[3] = {d.source(t), 0, 0};
  for (int i = 1; i < 3; ++i) in[i] = i < arity ? d.source(t) : in[0];
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      if (t.count == 1) {
        const uint64_t x[3] = {w.at(in[0], l), w.at(in[1], l), w.at(in[2], l)};
        w.at(to, l) = f(w, x);
        return;
      }
      uint64_t r = 0;
      for (int s = 0; s < 32; s += 16) {
        const uint64_t x[3] = {w.at(in[0], l) >> s & 0xffff, w.at(in[1], l) >> s & 0xffff,
                               w.at(in[2], l) >> s & 0xffff};
        r |= f(w, x) << s;
      }
      w.at(to, l) = r;
    });
  };
}

void arithmetic(Decoder& d, const Rule& rule) {
  Modes m;
  m.round = d.rounding();
  m.ftz = d.flag("ftz");
  m.sat = d.flag("sat");
  m.relu = d.flag("relu");
  m.type = d.type();
  if (!m.type.floating()) d.fail("wanted a float type");
  if (m.type.width == 64 && (m.round != Round::even || m.sat || m.ftz))
    d.fail("f64 in this form is not supported");
  elementwise(d, m.type, rule.arity, [m, &rule](Warp&, const uint64_t* x) { return evaluate(rule, m, x); });
}

// The type decides between integer and float: does a float type stand in the opcode?
bool is_float(const Decoder& d) {
  for (const char* name : {".f32", ".f64", ".f16", ".f16x2", ".bf16", ".bf16x2"}) {
    const std::string_view o = d.instruction.opcode, n = name;
    if (o.size() >= n.size() && o.substr(o.size() - n.size()) == n) return true;
  }
  return false;
}

void negate_or_abs(Decoder& d, bool negate) {
  const bool ftz = d.flag("ftz");
  const Type t = d.type();
  const uint64_t sign = 1ull << (t.width - 1);
  elementwise(d, t, 1, [=](Warp&, const uint64_t* x) {
    uint64_t v = negate ? x[0] ^ sign : x[0] & ~sign;
    return ftz ? encode(t.format(), flush(t.format(), decode(t.format(), v))) : v;
  });
}

void extreme(Decoder& d, bool maximum) {
  const bool ftz = d.flag("ftz"), keep_nan = d.flag("NaN"), xorsign = d.flag("xorsign");
  if (xorsign) d.one_of({"abs"});
  const Type t = d.type();
  elementwise(d, t, 2, [=](Warp&, const uint64_t* x) -> uint64_t {
    const auto value = [&](uint64_t bits) {
      const double v = t.width == 64 ? double_of(bits) : decode(t.format(), bits);
      const double flushed = ftz ? flush(t.format(), v) : v;
      return xorsign ? std::fabs(flushed) : flushed;
    };
    const double a = value(x[0]), b = value(x[1]);
    double y = maximum ? std::max(a, b) : std::min(a, b);
    if (a == b) y = std::signbit(a) == maximum ? b : a;  // -0 < +0
    if (std::isnan(a)) y = keep_nan ? a : b;
    if (std::isnan(b)) y = keep_nan ? b : a;
    if (xorsign && (x[0] ^ x[1]) >> (t.width - 1) & 1) y = -y;
    return t.width == 64 ? bits_of(y) : encode(t.format(), y);
  });
}

// --- approximations ---

// PTX only bounds their error, so a result is anywhere within the bound, by a hash of seed and operands: code that needs more
// than is promised fails here. Bounds as the PTX ISA states them (from memory, where our copy of its text lacks the tables).
struct Bound {
  double relative;  // to the result
  double absolute;  // times max(1, |result|)
};
double hash_to_unit(uint64_t seed, uint64_t a, uint64_t b) {  // (-1, 1)
  uint64_t h = seed * 0x9e3779b97f4a7c15 + a;
  for (uint64_t part : {b, uint64_t{0x2545f4914f6cdd1d}}) {
    h = (h ^ h >> 31) * 0xbf58476d1ce4e5b9 + part;
    h = (h ^ h >> 29) * 0x94d049bb133111eb;
  }
  return std::ldexp(static_cast<double>(h >> 11), -52) - 1;
}

template <class F>
void approximate(Decoder& d, int arity, Bound f32, Bound f16, Bound bf16, F exact) {
  const bool ftz = d.flag("ftz");
  const Type t = d.type();
  const Bound bound = t.width == 32 ? f32 : t.kind == Type::bf ? bf16 : f16;
  if (!t.floating() || t.width == 64 || (bound.relative == 0 && bound.absolute == 0))
    d.fail("no approximation of this type");
  elementwise(d, t, arity, [=](Warp& w, const uint64_t* x) {
    double a = decode(t.format(), x[0]), b = decode(t.format(), x[1]);
    if (ftz) a = flush(t.format(), a), b = flush(t.format(), b);
    double y = exact(a, b);
    const Options& o = w.block.launch.options;
    if (o.approximate && std::isfinite(y)) {
      const double rounding = std::ldexp(0.5, -t.format().mantissa);  // of the result, part of the bound
      const double u = hash_to_unit(o.seed, x[0], x[1]);
      if (bound.relative > 0) y *= 1 + (bound.relative - rounding) * u;
      if (bound.absolute > 0) y += (bound.absolute - rounding) * std::max(1.0, std::fabs(y)) * u;
    }
    if (ftz) y = flush(t.format(), y);
    return encode(t.format(), y);
  });
}

constexpr Bound kNone{0, 0};

void ex2(Decoder& d) {
  d.one_of({"approx"});
  approximate(d, 1, {0x1p-22, 0}, {0x1.12p-10, 0}, {0x1p-7, 0},
              [](double a, double) { return std::exp2(a); });
}
void lg2(Decoder& d) {
  d.one_of({"approx"});
  approximate(d, 1, {0, 0x1p-22}, kNone, kNone, [](double a, double) { return std::log2(a); });
}
void tanh(Decoder& d) {
  d.one_of({"approx"});
  approximate(d, 1, {0x1p-11, 0}, {0, 0x1.02p-11}, {0x1p-8, 0},
              [](double a, double) { return std::tanh(a); });
}
void rsqrt(Decoder& d) {
  d.one_of({"approx"});
  approximate(d, 1, {0x1.12p-23, 0}, kNone, kNone, [](double a, double) { return 1 / std::sqrt(a); });
}
void sine(Decoder& d, bool cosine) {
  d.one_of({"approx"});
  approximate(d, 1, {0, 0x1.6ap-21}, kNone, kNone,
              [cosine](double a, double) { return cosine ? std::cos(a) : std::sin(a); });
}
void rcp(Decoder& d) {
  if (!d.flag("approx")) return arithmetic(d, kRcp);
  approximate(d, 1, {0x1p-23, 0}, kNone, kNone, [](double a, double) { return 1 / a; });
}
void root(Decoder& d) {
  if (!d.flag("approx")) return arithmetic(d, kSqrt);
  approximate(d, 1, {0x1p-23, 0}, kNone, kNone, [](double a, double) { return std::sqrt(a); });
}
void divide(Decoder& d) {
  if (!is_float(d)) return integer_div(d);
  if (d.any_of({"approx", "full"}).empty()) return arithmetic(d, kDiv);
  approximate(d, 2, {0x1p-22, 0}, kNone, kNone, [](double a, double b) { return a / b; });
}

void copysign(Decoder& d) {
  const Type t = d.type();
  const uint64_t sign = 1ull << (t.width - 1);
  elementwise(d, t, 2, [=](Warp&, const uint64_t* x) { return (x[0] & sign) | (x[1] & ~sign); });
}

}  // namespace

void add_floating(Table& t) {
  t["add"] = [](Decoder& d) { is_float(d) ? arithmetic(d, kAdd) : integer_add(d); };
  t["sub"] = [](Decoder& d) { is_float(d) ? arithmetic(d, kSub) : integer_sub(d); };
  t["mul"] = [](Decoder& d) { is_float(d) ? arithmetic(d, kMul) : integer_mul(d); };
  t["mad"] = [](Decoder& d) { is_float(d) ? arithmetic(d, kFma) : integer_mad(d); };
  t["fma"] = [](Decoder& d) { arithmetic(d, kFma); };
  t["div"] = divide;
  t["rcp"] = rcp;
  t["sqrt"] = root;
  t["neg"] = [](Decoder& d) { is_float(d) ? negate_or_abs(d, true) : integer_neg(d); };
  t["abs"] = [](Decoder& d) { is_float(d) ? negate_or_abs(d, false) : integer_abs(d); };
  t["min"] = [](Decoder& d) { is_float(d) ? extreme(d, false) : integer_min(d); };
  t["max"] = [](Decoder& d) { is_float(d) ? extreme(d, true) : integer_max(d); };
  t["copysign"] = copysign;
  t["ex2"] = ex2;
  t["lg2"] = lg2;
  t["tanh"] = tanh;
  t["rsqrt"] = rsqrt;
  t["sin"] = [](Decoder& d) { sine(d, false); };
  t["cos"] = [](Decoder& d) { sine(d, true); };
}

}  // namespace lissom::ptx
