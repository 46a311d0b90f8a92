// SPDX-License-Identifier: Apache-2.0
// Matrix instructions, exchanges between lanes, copies and conversions against independent statements. Without arguments: the
// built-in checks; prints the first failure and returns 1. For test_simt.py, which compares with torch:
//   product BITS M N K IN OUT   y = W x^T from torch's compressed W, its reordered metadata and x
//   numbers IN OUT              conversions of the 65536 values of f16 and bf16, and of the floats in IN
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <fstream>
#include <random>
#include <vector>

#include "../cpp/require.h"
#include "core/cuda/dev.cuh"
#include "simt.h"

using namespace lissom;
using dev::Grid;

namespace {

std::mt19937 random_numbers(5);
int draw(int from, int to) { return from + static_cast<int>(random_numbers() % (to - from + 1)); }

// --- ldmatrix: element c of row r of matrix i is 64 i + 8 r + c; rows lie in shared memory in another order ---
template <int Count, bool Trans>
void load_kernel(uint32_t* out) {
  const int l = dev::lane(), place = (l * 13 + 5) % 32;
  dev::Vec<uint16_t, 8> row;
  for (int c = 0; c < 8; ++c) row[c] = static_cast<uint16_t>(8 * l + c);
  const auto mine = dev::shared<dev::Vec<uint16_t, 8>>(16 * place);
  mine.store(0, row);
  dev::warp_sync();
  uint32_t r[Count];
  dev::ldmatrix<Count, Trans>(r, mine);
  for (int i = 0; i < Count; ++i) dev::store(out + 32 * i + l, r[i]);
}

template <int Count, bool Trans>
bool ldmatrix_is_right() {
  simt::Buffer<uint32_t> out(32 * Count);
  simt::Run run;
  REQUIRE(dev::launch(load_kernel<Count, Trans>, Grid{}, 32, 512, nullptr, out.data()) == 0);
  for (int i = 0; i < Count; ++i)
    for (int l = 0; l < 32; ++l)
      for (int h = 0; h < 2; ++h) {
        const int major = l / 4, minor = 2 * (l % 4) + h;
        const uint32_t wanted = 64 * i + (Trans ? 8 * minor + major : 8 * major + minor);
        REQUIRE((out[32 * i + l] >> 16 * h & 0xffffu) == wanted);
      }
  return true;
}

// --- mma: fragments filled by the element lists of the PTX text (a_i with row and column), products of plain matrices ---
struct Shape {
  int bits, k;
  bool sparse;
  int selector;
};

template <int Bits, bool Sparse, int Selector>
void mma_kernel(const uint32_t* a, const uint32_t* b, const uint32_t* meta, uint32_t* d) {
  const int l = dev::lane();
  uint32_t ra[4], rb[4];
  for (int i = 0; i < 4; ++i) {
    ra[i] = dev::load(a + 4 * l + i);
    rb[i] = dev::load(b + 4 * l + i);
  }
  const uint32_t dense_b[2] = {rb[0], rb[1]};
  if constexpr (Bits == 8) {
    int rd[4];
    for (int i = 0; i < 4; ++i) rd[i] = static_cast<int>(dev::load_plain(d + 4 * l + i));
    if constexpr (Sparse)
      dev::mma_sp_m16n8k64(rd, ra, rb, dev::load(meta + l));
    else
      dev::mma_m16n8k32(rd, ra, dense_b);
    for (int i = 0; i < 4; ++i) dev::store(d + 4 * l + i, static_cast<uint32_t>(rd[i]));
  } else {
    using T = std::conditional_t<Bits == 16, dev::bf16, dev::f16>;
    float rd[4];
    for (int i = 0; i < 4; ++i) rd[i] = dev::bits_float(dev::load_plain(d + 4 * l + i));
    if constexpr (Sparse)
      dev::mma_sp_m16n8k32<T, Selector>(rd, ra, rb, dev::load(meta + l));
    else
      dev::mma_m16n8k16<T>(rd, ra, dense_b);
    for (int i = 0; i < 4; ++i) dev::store(d + 4 * l + i, dev::float_bits(rd[i]));
  }
}

// Bits: 8 int8, 16 bf16, 17 f16.
template <int Bits, bool Sparse, int Selector>
bool mma_is_right() {
  constexpr int kPer = Bits == 8 ? 4 : 2, kDense = (Sparse ? 16 : 8) * kPer, kKept = 8 * kPer,
                kWidth = 32 / kPer;
  const auto encode = [](int v) -> uint32_t {
    if (Bits == 8) return static_cast<uint8_t>(v);
    const float x = static_cast<float>(v) / 64;
    return Bits == 16 ? dev::from_float<dev::bf16>(x).bits : dev::from_float<dev::f16>(x).bits;
  };
  for (int repeat = 0; repeat < 20; ++repeat) {
    int dense[16][64] = {}, b[64][8];
    simt::Buffer<uint32_t> ra(128, 0), rb(128, 0), meta(32, 0), rd(128, 0);
    for (auto& word : meta) word = random_numbers();  // what no rule below overwrites must not matter
    int kept[16][32][2];                              // quad -> dense columns
    for (int row = 0; row < 16; ++row)
      for (int quad = 0; quad < kDense / 4; ++quad) {
        const int pairs[6][2] = {{0, 1}, {0, 2}, {0, 3}, {1, 2}, {1, 3}, {2, 3}}, *pair = pairs[draw(0, 5)];
        for (int slot = 0; slot < 2; ++slot) kept[row][quad][slot] = 4 * quad + pair[slot];
        const uint32_t nibble = pair[0] | pair[1] << 2;
        // 16 bit: rows 0-7 of columns 0-15, 16-31 in lanes 4 row + 2 selector + {0, 1}, rows 8-15 in the high halves.
        int lane = 4 * (row % 8) + 2 * Selector + quad / 4, shift = 16 * (row / 8) + 4 * (quad % 4);
        if (Bits ==
            8) {  // columns 0-31: rows 0-7, 8-15 in lanes 4 row, 4 row + 1; columns 32-63: in + 2, + 3
          lane = 4 * (row % 8) + (row >= 8 ? 1 : 0) + (quad >= 8 ? 2 : 0);
          shift = 4 * (quad % 8);
        }
        meta[lane] = (meta[lane] & ~(15u << shift)) | nibble << shift;
      }
    for (auto& row : b)
      for (int& v : row) v = draw(-64, 63);
    for (int lane = 0; lane < 32; ++lane) {
      const int group = lane / 4, thread = lane % 4;
      for (int i = 0; i < 4 * kPer;
           ++i) {  // a_i: the first kPer in row group, the next in row group + 8, ...
        const int row = i / kPer % 2 == 0 ? group : group + 8, v = draw(-64, 63);
        const int column = thread * kPer + i % kPer + (i < 2 * kPer ? 0 : kKept / 2);
        if (Sparse)
          dense[row][kept[row][column / 2][column % 2]] = v;
        else
          dense[row][column] = v;
        ra[4 * lane + i / kPer] |= encode(v) << kWidth * (i % kPer);
      }
      for (int i = 0; i < kDense / 4;
           ++i)  // b_i: rows thread * kPer + ..., every kPer elements 4 kPer rows further
        rb[4 * lane + i / kPer] |= encode(b[thread * kPer + i % kPer + 4 * kPer * (i / kPer)][group])
                                   << kWidth * (i % kPer);
    }
    for (auto& word : rd) {
      const int v = draw(-1000, 1000);
      word = Bits == 8 ? static_cast<uint32_t>(v) : dev::float_bits(static_cast<float>(v) / 4096);
    }
    const std::vector<uint32_t> before(rd.begin(), rd.end());
    simt::Run run;
    REQUIRE(dev::launch(mma_kernel<Bits, Sparse, Selector>, Grid{}, 32, 0, nullptr, ra.data(), rb.data(),
                        meta.data(), rd.data()) == 0);
    for (int lane = 0; lane < 32; ++lane)
      for (int i = 0; i < 4; ++i) {
        const int row = i < 2 ? lane / 4 : lane / 4 + 8, column = lane % 4 * 2 + i % 2;
        int sum = 0;
        for (int k = 0; k < kDense; ++k) sum += dense[row][k] * b[k][column];
        const uint32_t old = before[4 * lane + i], now = rd[4 * lane + i];
        if (Bits == 8)
          REQUIRE(static_cast<int>(now) == static_cast<int>(old) + sum);
        else
          REQUIRE(dev::bits_float(now) == dev::bits_float(old) + static_cast<float>(sum) / 4096);
      }
  }
  return true;
}

// Each of the 16 nibbles in one place: the six increasing pairs pass, the ten others are reported.
bool illegal_nibbles_are_reported() {
  for (uint32_t nibble = 0; nibble < 16; ++nibble)
    for (int bits : {8, 16}) {
      simt::Buffer<uint32_t> a(128), b(128), meta(32, 0x4444eeeeu), d(128);
      meta[21] = (meta[21] & ~0xf000u) | nibble << 12;  // t = 1: counts with selector 0 and for 8 bit
      const bool legal = (nibble & 3) < nibble >> 2;
      simt::Run run;
      dev::launch(bits == 8 ? mma_kernel<8, true, 0> : mma_kernel<16, true, 0>, Grid{}, 32, 0, nullptr,
                  a.data(), b.data(), meta.data(), d.data());
      REQUIRE(legal == !run.fault && (legal || run.fault->kind == simt::Kind::operand));
      simt::Run other;
      REQUIRE(dev::launch(mma_kernel<16, true, 1>, Grid{}, 32, 0, nullptr, a.data(), b.data(), meta.data(),
                          d.data()) == 0);
    }
  return true;
}

// --- lanes ---
bool exchanges_are_right() {
  for (int width = 1; width <= 32; width *= 2)
    for (int by = 0; by < 32; ++by) {
      simt::Buffer<int> out(4 * 32);
      simt::Run run;
      const auto kernel = +[](int* to, int w, int d) {
        const int l = dev::lane(), mine = 100 + l;
        dev::store(to + l, dev::shuffle(mine, d + l, w));
        dev::store(to + 32 + l, dev::shuffle_xor(mine, d, w));
        dev::store(to + 64 + l, static_cast<int>(dev::shuffle_up(static_cast<float>(mine), d, w)));
        dev::store(to + 96 + l, static_cast<int>(dev::shuffle_down(static_cast<double>(mine), d, w)));
      };
      REQUIRE(dev::launch(kernel, Grid{}, 32, 0, nullptr, out.data(), width, by) == 0);
      for (int l = 0; l < 32; ++l) {
        const int first = l / width * width, last = first + width - 1;
        REQUIRE(out[l] == 100 + first + (by + l) % width);
        REQUIRE(out[32 + l] ==
                100 + ((l ^ by) <= last ? l ^ by : l));  // a later segment is out of reach, an earlier not
        REQUIRE(out[64 + l] == 100 + (l - by >= first ? l - by : l));
        REQUIRE(out[96 + l] == 100 + (l + by <= last ? l + by : l));
      }
    }
  simt::Buffer<int> out(8);
  simt::Run run;
  const auto kernel = +[](int* to) {
    const int l = dev::lane();
    const int result[8] = {static_cast<int>(dev::ballot(l % 3 == 0)),
                           dev::any(l == 9),
                           dev::any(false),
                           dev::all(l < 32),
                           dev::all(l != 17),
                           dev::reduce_add(l),
                           dev::reduce_min(l - 7),
                           dev::reduce_max(-l)};
    if (l == 31)
      for (int i = 0; i < 8; ++i) dev::store(to + i, result[i]);
  };
  REQUIRE(dev::launch(kernel, Grid{}, 32, 0, nullptr, out.data()) == 0);
  const int wanted[8] = {0x49249249, 1, 0, 1, 0, 496, -7, 0};
  for (int i = 0; i < 8; ++i) REQUIRE(out[i] == wanted[i]);
  return true;
}

bool atomics_are_right() {
  simt::Buffer<uint32_t> old(64), total(4, 5);
  simt::Buffer<float> sum(1);
  simt::Run run;
  const auto kernel = +[](uint32_t* was, uint32_t* all, float* f) {
    const uint32_t t = dev::thread();
    dev::store(was + t, dev::atomic_add(all, 2u));
    dev::atomic_max(all + 1, t);
    dev::atomic_cas(all + 2, 5u, 100 + t);
    dev::atomic_cas(all + 3, 6u, 1u);
    dev::atomic_add(f, 0.5f);
  };
  REQUIRE(dev::launch(kernel, Grid{}, 64, 0, nullptr, old.data(), total.data(), sum.data()) == 0);
  uint64_t seen = 0;
  for (uint32_t v : old) seen |= uint64_t{1} << (v - 5) / 2;
  REQUIRE(seen == ~uint64_t{0} && total[0] == 5 + 128 && total[1] == 63 && total[2] == 100 && total[3] == 5);
  REQUIRE(sum[0] == 32);
  return true;
}

// Bytes that are read, zeros behind them, and when they move.
bool copies_are_right() {
  for (simt::Landing landing : {simt::Landing::early, simt::Landing::late, simt::Landing::random})
    for (int bytes = 0; bytes <= 16; ++bytes) {
      simt::Buffer<uint8_t> from(32 * 16, 7), to(32 * 16, 9), before(32 * 16, 9);
      simt::Run run;
      run.landing = landing;
      run.detector = false;  // looks at bytes in flight
      const auto kernel = +[](const uint8_t* in, uint8_t* early, uint8_t* out, int count) {
        const auto mine = dev::shared<dev::Vec<uint8_t, 16>>(16 * dev::lane());
        dev::cp_async<16>(mine, in + 16 * dev::lane(), count);
        dev::cp_async_commit();
        dev::store(reinterpret_cast<dev::Vec<uint8_t, 16>*>(early) + dev::lane(), mine.load());
        dev::cp_async_wait<0>();
        dev::store(reinterpret_cast<dev::Vec<uint8_t, 16>*>(out) + dev::lane(), mine.load());
      };
      REQUIRE(dev::launch(kernel, Grid{}, 32, 512, nullptr, from.data(), before.data(), to.data(), bytes) ==
              0);
      for (int i = 0; i < 512; ++i) REQUIRE(to[i] == (i % 16 < bytes ? 7 : 0));
      if (landing == simt::Landing::early) REQUIRE(memcmp(before.data(), to.data(), 512) == 0);
      if (landing == simt::Landing::late) REQUIRE(before[0] == 0xff && before[511] == 0xff);
    }
  return true;
}

bool bytes_are_permuted() {
  REQUIRE(dev::permute_bytes(0x33221100u, 0x77665544u, 0x7250u) == 0x77225500u);
  REQUIRE(dev::pack<dev::f16>(1.0f, -2.0f) == 0xc0003c00u && dev::unpack<dev::f16>(0xc0003c00u)[1] == -2.0f);
  REQUIRE(dev::pack<dev::bf16>(1.0f, -2.0f) == 0xc0003f80u && dev::unpack<dev::bf16>(0xc0003f80u)[0] == 1.0f);
  return true;
}

// --- for test_simt.py ---
template <int Bits>
void product_kernel(const uint32_t* values, const uint32_t* meta, const uint32_t* x, float* y, int m, int n,
                    int k) {
  constexpr int kPer = Bits == 8 ? 4 : 2, kStep = 16 * kPer;
  const int l = dev::lane(), g = l / 4, t = l % 4, row = 16 * dev::block_x(), column = 8 * dev::block_y();
  float f[4] = {};
  int d[4] = {};
  for (int step = 0; step < k; step += kStep) {
    uint32_t a[4], b[4];
    for (int r = 0; r < 4; ++r) {
      const int kept = step / 2 + kPer * t + 4 * kPer * (r >> 1);
      a[r] = dev::load(values + ((row + g + 8 * (r & 1)) * (k / 2) + kept) / kPer);
      b[r] = dev::load(x + ((column + g) * k + step + kPer * t + 4 * kPer * r) / kPer);
    }
    if constexpr (Bits == 8) {
      dev::mma_sp_m16n8k64(d, a, b, dev::load(meta + step / 64 * 2 * m + row / 16 * 32 + l));
    } else {
      const uint32_t word = dev::load(meta + step / 32 * m + row / 32 * 32 + l);
      using T = std::conditional_t<Bits == 16, dev::bf16, dev::f16>;
      if (row % 32 == 0)
        dev::mma_sp_m16n8k32<T, 0>(f, a, b, word);
      else
        dev::mma_sp_m16n8k32<T, 1>(f, a, b, word);
    }
  }
  for (int r = 0; r < 4; ++r)
    dev::store(y + (row + g + 8 * (r >> 1)) * n + column + 2 * t + (r & 1),
               Bits == 8 ? static_cast<float>(d[r]) : f[r]);
}

std::vector<char> read(const char* path) {
  std::ifstream file(path, std::ios::binary);
  return {std::istreambuf_iterator<char>(file), {}};
}
template <class T>
void write(const char* path, const std::vector<T>& data) {
  std::ofstream(path, std::ios::binary)
      .write(reinterpret_cast<const char*>(data.data()),
             static_cast<std::streamsize>(data.size() * sizeof(T)));
}

int product(char** argument) {
  const int bits = atoi(argument[0]), m = atoi(argument[1]), n = atoi(argument[2]), k = atoi(argument[3]);
  const std::vector<char> in = read(argument[4]);
  const size_t bytes = bits == 8 ? 1 : 2, values = m * k / 2 * bytes, meta = m * k / 8;
  std::vector<float> y(m * n);
  simt::Run run;
  const auto kernel = bits == 8 ? product_kernel<8> : bits == 16 ? product_kernel<16> : product_kernel<17>;
  const auto word = [&](size_t at) { return reinterpret_cast<const uint32_t*>(in.data() + at); };
  dev::launch(kernel, Grid{m / 16, n / 8}, 32, 0, nullptr, word(0), word(values), word(values + meta),
              y.data(), m, n, k);
  if (run.fault) fputs(run.fault->text.c_str(), stderr);
  write(argument[5], y);
  return run.fault ? 1 : 0;
}

int numbers(char** argument) {
  const std::vector<char> in = read(argument[0]);
  std::vector<uint32_t> out;
  for (uint32_t i = 0; i < 65536; ++i)
    out.push_back(dev::float_bits(dev::to_float(dev::f16{static_cast<uint16_t>(i)})));
  for (uint32_t i = 0; i < 65536; ++i)
    out.push_back(dev::float_bits(dev::to_float(dev::bf16{static_cast<uint16_t>(i)})));
  for (size_t i = 0; i < in.size() / 4; ++i) {
    float x;
    memcpy(&x, in.data() + 4 * i, 4);
    out.push_back(dev::from_float<dev::f16>(x).bits |
                  static_cast<uint32_t>(dev::from_float<dev::bf16>(x).bits) << 16);
  }
  write(argument[1], out);
  return 0;
}

}  // namespace

int main(int count, char** argument) {
  if (count == 8 && strcmp(argument[1], "product") == 0) return product(argument + 2);
  if (count == 4 && strcmp(argument[1], "numbers") == 0) return numbers(argument + 2);
  const bool right =
      ldmatrix_is_right<1, false>() && ldmatrix_is_right<1, true>() && ldmatrix_is_right<2, false>() &&
      ldmatrix_is_right<2, true>() && ldmatrix_is_right<4, false>() && ldmatrix_is_right<4, true>() &&
      mma_is_right<16, false, 0>() && mma_is_right<17, false, 0>() && mma_is_right<16, true, 0>() &&
      mma_is_right<16, true, 1>() && mma_is_right<17, true, 0>() && mma_is_right<17, true, 1>() &&
      mma_is_right<8, false, 0>() && mma_is_right<8, true, 0>() && illegal_nibbles_are_reported() &&
      exchanges_are_right() && atomics_are_right() && copies_are_right() && bytes_are_permuted();
  if (right) puts("instructions: ok");
  return right ? 0 : 1;
}
