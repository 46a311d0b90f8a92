// SPDX-License-Identifier: Apache-2.0
// Problems for the forward kernels of 2:4 linear layers: W packed here element by element, inputs whose sums are exact, and the
// result that must come out, bit for bit.
#pragma once

#include <math.h>

#include "sparse24/cuda/launch.h"
#include "sparse24/sparse24.h"
#include "sparse24_cases.h"

namespace cases {

using lissom::sparse24::Act;
namespace sm80 = lissom::sparse24::sm80;

constexpr int kBf16 = 1, kF16 = 2, kInt8 = 3, kF32 = 0;

struct Shape {
  int64_t m, n, k;
};

struct Options {
  int dtype = kBf16, out = kBf16;
  bool bias = false, residual = false;
  int bias_dtype = kF32;
  Act act = Act::none;
  bool real = false;      // values that are not exact, compared with a bound
  int odd = 0;            // x rows: so many more elements apart than 16 bytes need
  bool infinite = false;  // the first token has an Inf, which only the weights that are kept there may meet
};

inline int64_t bytes_of(int dtype) { return dtype == kF32 ? 4 : dtype == kInt8 ? 1 : 2; }
inline void put(void* p, int dtype, size_t i, float v) {
  if (dtype == kF32)
    static_cast<float*>(p)[i] = v;
  else if (dtype == kInt8)
    static_cast<int8_t*>(p)[i] = static_cast<int8_t>(v);
  else
    static_cast<uint16_t*>(p)[i] = to_bits(static_cast<DType>(dtype), v);
}
inline float get(const void* p, int dtype, size_t i) {
  if (dtype == kF32) return static_cast<const float*>(p)[i];
  if (dtype == kInt8) return static_cast<const int8_t*>(p)[i];
  return to_float(static_cast<DType>(dtype), static_cast<const uint16_t*>(p)[i]);
}

inline double activated(double v, Act act) {
  switch (act) {
    case Act::none: return v;
    case Act::relu: return v < 0 ? 0 : v;
    case Act::gelu: return 0.5 * v * (1 + erf(v * sqrt(0.5)));
    case Act::gelu_tanh: return 0.5 * v * (1 + tanh(0.7978845608028654 * (v + 0.044715 * v * v * v)));
    case Act::silu: return v / (1 + exp(-v));
  }
  return v;
}

struct LinearCase {
  Shape s;
  Options o;
  int64_t stride;
  simt::Buffer<uint8_t> x, records, bias, residual, y;
  simt::Buffer<float> scale_w, scale_x;
  std::vector<double> wanted, magnitude;  // magnitude: sum |x| |w|

  static int64_t stride_of(const Shape& s, const Options& o) {
    const int64_t granule = 16 / bytes_of(o.dtype);
    return (s.k + granule - 1) / granule * granule + o.odd;
  }
  float draw(Random& random) const {
    if (o.dtype == kInt8) return static_cast<float>(static_cast<int>(random.below(255)) - 127);
    return o.real ? (static_cast<int>(random.below(2000001)) - 1000000) * 1e-6f : random.exact();
  }

  LinearCase(const Shape& shape, const Options& options, uint64_t seed)
      : s(shape),
        o(options),
        stride(stride_of(s, o)),
        x(static_cast<size_t>(s.m * stride * bytes_of(o.dtype)), 0x7f),  // NaN between the rows
        records(static_cast<size_t>(sm80::packed_bytes(s.n, s.k, bytes_of(o.dtype)) - sm80::kHeaderBytes)),
        bias(static_cast<size_t>(s.n * bytes_of(o.bias_dtype))),
        residual(static_cast<size_t>(s.m * (s.n + 8) * bytes_of(o.out)), 0x7f),
        y(static_cast<size_t>(s.m * s.n * bytes_of(o.out)), 0x7f),
        scale_w(static_cast<size_t>(s.n)),
        scale_x(static_cast<size_t>(s.m)),
        wanted(static_cast<size_t>(s.m * s.n)),
        magnitude(wanted.size()) {
    Random random(seed);
    std::vector<float> dense_x(static_cast<size_t>(s.m * s.k));
    for (int64_t m = 0; m < s.m; ++m)
      for (int64_t k = 0; k < s.k; ++k) {
        const size_t at = static_cast<size_t>(m * stride + k);
        put(x.data(), o.dtype, at, o.infinite && m == 0 && k == 5 ? INFINITY : draw(random));
        dense_x[static_cast<size_t>(m * s.k + k)] = get(x.data(), o.dtype, at);
      }
    for (int64_t n = 0; n < s.n; ++n) {
      put(bias.data(), o.bias_dtype, static_cast<size_t>(n), random.exact());
      scale_w[static_cast<size_t>(n)] = ldexpf(1.0f, -12 - static_cast<int>(n % 3));
    }
    for (int64_t m = 0; m < s.m; ++m) {
      scale_x[static_cast<size_t>(m)] = ldexpf(1.0f, static_cast<int>(m % 3));
      for (int64_t n = 0; n < s.n; ++n)
        put(residual.data(), o.out, static_cast<size_t>(m * (s.n + 8) + n), random.exact());
    }
    pad();
    for (int64_t n = 0; n < s.n; ++n) add_row(n, dense_x, random);
    for (int64_t m = 0; m < s.m; ++m) {
      for (int64_t n = 0; n < s.n; ++n) {
        double& v = wanted[static_cast<size_t>(m * s.n + n)];
        if (o.dtype == kInt8) v *= scale_w[static_cast<size_t>(n)] * scale_x[static_cast<size_t>(m)];
        if (o.bias) v += get(bias.data(), o.bias_dtype, static_cast<size_t>(n));
        v = activated(v, o.act);
        if (o.residual) v += get(residual.data(), o.out, static_cast<size_t>(m * (s.n + 8) + n));
      }
    }
  }

  uint8_t* record_at(int64_t n, int64_t k) const {
    return records.data() + sm80::record_offset(n, k, s.k, bytes_of(o.dtype)) - sm80::kHeaderBytes;
  }
  // Zeros, nibble 0xE.
  void pad() const {
    const int64_t b = bytes_of(o.dtype), size = sm80::record_bytes(b);
    for (size_t at = 0; at < records.size(); at += static_cast<size_t>(size))
      memset(records.data() + at, 0xEE, static_cast<size_t>(sm80::meta_bytes(b)));
  }
  void add_row(int64_t n, const std::vector<float>& dense_x, Random& random) {
    const int64_t b = bytes_of(o.dtype), columns = sm80::record_columns(b);
    for (int64_t q = 0; q < s.k / 4; ++q) {
      uint8_t* record = record_at(n, 4 * q);
      const int64_t quad = q % (columns / 4);
      const uint32_t nibble = kNibbles[random.below(6)];
      uint32_t word;
      memcpy(&word, record + sm80::meta_offset(n % 32, quad, b), 4);
      const int shift = sm80::meta_shift(n % 32, quad, b);
      word = (word & ~(15u << shift)) | nibble << shift;
      memcpy(record + sm80::meta_offset(n % 32, quad, b), &word, 4);
      for (int slot = 0; slot < 2; ++slot) {
        uint8_t* value = record + sm80::value_offset(n % 32, quad, slot, b);
        put(value, o.dtype, 0, draw(random));
        const double kept = get(value, o.dtype, 0);
        const int64_t k = 4 * q + (slot ? nibble >> 2 : nibble & 3u);
        for (int64_t m = 0; m < s.m; ++m) {
          const double term = kept * dense_x[static_cast<size_t>(m * s.k + k)];
          wanted[static_cast<size_t>(m * s.n + n)] += term;
          magnitude[static_cast<size_t>(m * s.n + n)] += fabs(term);
        }
      }
    }
  }

  LissomLinear args() const {
    LissomLinear p{};
    p.m = s.m, p.n = s.n, p.k = s.k;
    p.dtype = o.dtype, p.out = o.out, p.act = static_cast<int32_t>(o.act), p.bias_dtype = o.bias_dtype;
    p.x = x.data(), p.x_stride = stride, p.records = records.data();
    p.bias = o.bias ? bias.data() : nullptr;
    p.residual = o.residual ? residual.data() : nullptr;
    p.residual_stride = s.n + 8;
    p.scale_w = o.dtype == kInt8 ? scale_w.data() : nullptr;
    p.scale_x = o.dtype == kInt8 ? scale_x.data() : nullptr;
    p.y = y.data();
    return p;
  }

  // Exact, or within the stated bound: float rounding of K terms in any order, the activation, one rounding of the result.
  std::string wrong() const {
    const bool loose = o.real || (o.act != Act::none && o.act != Act::relu);
    const double rounding = o.out == kF32 ? 6e-8 : o.out == kBf16 ? 0x1p-8 : 0x1p-11;
    for (size_t i = 0; i < wanted.size(); ++i) {
      const float got = get(y.data(), o.out, i);
      const double off = fabs(got - wanted[i]);
      const double bound = 3e-7 * magnitude[i] + 2e-6 + rounding * fabs(wanted[i]);
      float rounded;
      put(&rounded, o.out, 0, static_cast<float>(wanted[i]));
      if (isnan(wanted[i]) ? isnan(got) : loose ? off <= bound : got == get(&rounded, o.out, 0)) continue;
      return "y [" + std::to_string(i / static_cast<size_t>(s.n)) + ", " +
             std::to_string(i % static_cast<size_t>(s.n)) + "] is " + std::to_string(got) + ", wanted " +
             std::to_string(wanted[i]);
    }
    return "";
  }
};

inline std::string describe(const Shape& s, const Options& o) {
  const char* types[] = {"f32", "bf16", "f16", "int8"};
  const char* acts[] = {"", " relu", " gelu", " gelu_tanh", " silu"};
  return std::string(types[o.dtype]) + " to " + types[o.out] + " " + std::to_string(s.m) + " x " +
         std::to_string(s.n) + " x " + std::to_string(s.k) + acts[static_cast<int>(o.act)] +
         (o.bias ? " bias" : "") + (o.residual ? " residual" : "");
}

}  // namespace cases
