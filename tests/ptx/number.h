// SPDX-License-Identifier: Apache-2.0
// Floating point formats of PTX, exact. Every finite value of every format (f32 and below) is a double, so one encoder and one
// decoder serve all. An operation is computed in double and rounded to odd: a sticky last bit, behind which rounding to any
// format of at most 51 bits, in any mode, gives what the infinitely precise result would give (Boldo and Melquiond 2008).
#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

namespace lissom::ptx {

enum class Round : uint8_t { even, zero, down, up, away };  // rn rz rm rp rna

struct Format {
  int exponent, mantissa;  // bits
  bool has_inf;
  uint64_t nan;         // canonical
  uint64_t max_finite;  // without sign
  constexpr int bias() const { return (1 << (exponent - 1)) - 1; }
  constexpr int sign_shift() const { return exponent + mantissa; }
};
constexpr Format kF32{8, 23, true, 0x7fffffff, 0x7f7fffff};
constexpr Format kF16{5, 10, true, 0x7fff, 0x7bff};
constexpr Format kBf16{8, 7, true, 0x7fff, 0x7f7f};
constexpr Format kTf32{8, 10, true, 0x7fffffff >> 13, 0x3fbff};
constexpr Format kE4m3{4, 3, false, 0x7f, 0x7e};
constexpr Format kE5m2{5, 2, true, 0x7f, 0x7b};

inline uint64_t encode(const Format& f, double x, Round mode = Round::even, bool satfinite = false) {
  if (std::isnan(x)) return f.nan;
  const bool negative = std::signbit(x);
  const uint64_t sign = static_cast<uint64_t>(negative) << f.sign_shift();
  const uint64_t inf = f.has_inf ? f.max_finite + 1 : f.nan;
  if (std::isinf(x)) return sign | (satfinite ? f.max_finite : inf);
  if (x == 0) return sign;
  const int lowest = 1 - f.bias();
  const int e = std::max(std::ilogb(x), lowest);
  const double scaled = std::scalbn(std::fabs(x), f.mantissa - e);  // in units of the last place
  const double whole = std::floor(scaled), rest = scaled - whole;
  const auto units = static_cast<uint64_t>(whole);
  bool up = false;
  switch (mode) {
    case Round::even: up = rest > 0.5 || (rest == 0.5 && (units & 1)); break;
    case Round::away: up = rest >= 0.5; break;
    case Round::zero: break;
    case Round::down: up = negative && rest > 0; break;
    case Round::up: up = !negative && rest > 0; break;
  }
  // The leading one of a normal number adds 1 to the exponent field; a subnormal has neither.
  const uint64_t bits = (static_cast<uint64_t>(e - lowest) << f.mantissa) + units + up;
  if (bits <= f.max_finite) return sign | bits;
  const bool outwards =
      mode == Round::even || mode == Round::away || mode == (negative ? Round::down : Round::up);
  return sign | (satfinite || !outwards ? f.max_finite : inf);
}

inline double decode(const Format& f, uint64_t bits) {
  const uint64_t field = bits >> f.mantissa & ((1u << f.exponent) - 1);
  const uint64_t low = bits & ((1ull << f.mantissa) - 1);
  const bool negative = bits >> f.sign_shift() & 1;
  double x;
  if (!f.has_inf && (bits & f.nan) == f.nan) {
    x = NAN;
  } else if (f.has_inf && field == (1u << f.exponent) - 1) {
    x = low ? NAN : INFINITY;
  } else if (field == 0) {
    x = std::scalbn(static_cast<double>(low), 1 - f.bias() - f.mantissa);
  } else {
    x = std::scalbn(static_cast<double>(low | 1ull << f.mantissa),
                    static_cast<int>(field) - f.bias() - f.mantissa);
  }
  return negative ? -x : x;
}

inline float float_of(uint64_t bits) { return std::bit_cast<float>(static_cast<uint32_t>(bits)); }
inline uint64_t bits_of(float x) { return std::isnan(x) ? kF32.nan : std::bit_cast<uint32_t>(x); }
inline double double_of(uint64_t bits) { return std::bit_cast<double>(bits); }
inline uint64_t bits_of(double x) { return std::bit_cast<uint64_t>(x); }

// `nearest` is a correctly rounded result and `error` has the sign of (exact - nearest): the result rounded to odd.
inline double to_odd(double nearest, double error) {
  if (error == 0 || !std::isfinite(nearest) || std::isnan(error)) return nearest;
  if (bits_of(nearest) & 1) return nearest;
  return std::nextafter(nearest, error > 0 ? INFINITY : -INFINITY);
}
inline double add_odd(double a, double b) {
  const double s = a + b, part = s - a;
  return to_odd(s, (a - (s - part)) + (b - part));  // Knuth's two-sum
}
// The product of two numbers of at most 26 bits is exact in double.
inline double fma_odd(double a, double b, double c) { return add_odd(a * b, c); }
inline double div_odd(double a, double b) {
  const double q = a / b, rest = std::fma(-q, b, a);
  return to_odd(q, std::signbit(b) ? -rest : rest);
}
inline double sqrt_odd(double a) {
  const double s = std::sqrt(a);
  return to_odd(s, std::fma(-s, s, a));
}
inline double integer_odd(uint64_t magnitude, bool negative) {
  const int drop = magnitude >> 53 ? 11 - std::countl_zero(magnitude) : 0;
  const bool lost = drop && (magnitude & ((1ull << drop) - 1));
  const double x = std::ldexp(static_cast<double>(magnitude >> drop | lost), drop);
  return negative ? -x : x;
}

// .ftz: subnormals of the format become zeros of their sign.
inline double flush(const Format& f, double x) {
  return std::fabs(x) < std::ldexp(1.0, 1 - f.bias()) ? std::copysign(0.0, x) : x;
}

}  // namespace lissom::ptx
