// SPDX-License-Identifier: Apache-2.0
// Host half of csrc/core/cuda/dev.cuh: the same names on the executor. Included by dev.cuh under -DLISSOM_SIMT.
// `at` is where the kernel stands: reports name that line, and barriers and collectives are told apart by it.
#pragma once

#include <math.h>

#include "executor.h"
#include "matrix.h"

#define LISSOM_KERNEL(max_threads, min_blocks) void
#define LISSOM_DEVICE inline
#define LISSOM_UNROLL

namespace lissom::dev {

using simt::Site;

// --- launch ---
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, int shared_bytes, void* /*stream*/, A... args) {
  return simt::launch(reinterpret_cast<const void*>(kernel), {grid.x, grid.y, grid.z}, threads, shared_bytes,
                      [=] { kernel(args...); });
}

// --- index ---
inline int thread() { return simt::index().thread; }
inline int lane() { return thread() & 31; }
inline int warp() { return thread() >> 5; }
inline int threads() { return simt::index().threads; }
inline int block_x() { return simt::index().block[0]; }
inline int block_y() { return simt::index().block[1]; }
inline int block_z() { return simt::index().block[2]; }
inline int grid_x() { return simt::index().grid[0]; }
inline int grid_y() { return simt::index().grid[1]; }
inline int grid_z() { return simt::index().grid[2]; }

// --- shared memory ---
template <class T>
struct Shared {
  uint32_t offset;  // bytes

  Shared operator+(int elements) const { return {offset + elements * static_cast<uint32_t>(sizeof(T))}; }
  template <class U>
  Shared<U> as() const {
    return {offset};
  }
  T load(int i = 0, Site at = Site::current()) const {
    T value;
    simt::shared_read(&value, (*this + i).offset, sizeof(T), at);
    return value;
  }
  void store(int i, T value, Site at = Site::current()) const {
    simt::shared_write((*this + i).offset, &value, sizeof(T), at);
  }
  uint32_t address() const { return offset; }
};

template <class T>
Shared<T> shared(int byte_offset) {
  return {static_cast<uint32_t>(byte_offset)};
}

// --- global memory ---
template <class T>
T load(const T* p, Site at = Site::current()) {
  T value;
  simt::global_read(&value, p, sizeof(T), true, at);
  return value;
}
template <class T>
T load_stream(const T* p, Site at = Site::current()) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  return load(p, at);
}
template <class T>
T load_plain(const T* p, Site at = Site::current()) {
  T value;
  simt::global_read(&value, p, sizeof(T), false, at);
  return value;
}
template <class T>
void store(T* p, T value, Site at = Site::current()) {
  simt::global_write(p, &value, sizeof(T), at);
}

// --- block ---
inline void barrier(Site at = Site::current()) { simt::block_barrier(at); }
inline void barrier_sync(int id, int count, Site at = Site::current()) {
  simt::named_barrier(id, count, true, at);
}
inline void barrier_arrive(int id, int count, Site at = Site::current()) {
  simt::named_barrier(id, count, false, at);
}

// --- warp ---
constexpr uint32_t kFullMask = 0xffffffffu;
inline void warp_sync(Site at = Site::current()) { simt::warp_barrier(at); }

// Each lane takes the value of lane from(l, its operand, first lane of its segment), or keeps its own where that is beyond
// the segment.
template <class T, class From>
T exchange(const char* operation, T value, int operand, int width, Site at, From from) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8, "shuffles move 4 or 8 bytes");
  struct Lane {
    T in, out;
    int operand, width;
  } mine{value, value, operand, width};
  simt::collective(operation, mine, at, [&](auto lane) {
    for (int l = 0; l < 32; ++l) {
      const int w = lane(l).width, first = l & ~(w - 1);
      if (w < 1 || w > 32 || (w & (w - 1)) || w != width)
        simt::fail(simt::Kind::operand, at,
                   "%s with width %d in lane %d; take one power of two up to 32 in all lanes", operation, w,
                   l);
      const int source = from(l, lane(l).operand, first, w);
      lane(l).out = source >= 0 && source < first + w ? lane(source).in : lane(l).in;
    }
  });
  return mine.out;
}
inline int checked_delta(int delta, Site at) {
  if (delta < 0 || delta > 31)
    simt::fail(simt::Kind::operand, at, "shuffle by %d lanes; only 0 to 31 mean anything", delta);
  return delta;
}
template <class T>
T shuffle(T value, int source_lane, int width = 32, Site at = Site::current()) {
  return exchange("shuffle", value, source_lane, width, at,
                  [](int, int source, int first, int w) { return first + (source & (w - 1)); });
}
template <class T>
T shuffle_xor(T value, int lane_mask, int width = 32, Site at = Site::current()) {
  return exchange("shuffle_xor", value, checked_delta(lane_mask, at), width, at,
                  [](int l, int mask, int, int) { return l ^ mask; });
}
template <class T>
T shuffle_up(T value, int delta, int width = 32, Site at = Site::current()) {
  return exchange("shuffle_up", value, checked_delta(delta, at), width, at,
                  [](int l, int d, int first, int) { return l - d < first ? -1 : l - d; });
}
template <class T>
T shuffle_down(T value, int delta, int width = 32, Site at = Site::current()) {
  return exchange("shuffle_down", value, checked_delta(delta, at), width, at,
                  [](int l, int d, int, int) { return l + d; });
}

// All lanes' values folded into one result for all.
template <class T, class Fold>
T fold(const char* operation, T value, Site at, Fold next) {
  T mine = value;
  simt::collective(operation, mine, at, [&](auto lane) {
    T all = lane(0);
    for (int l = 1; l < 32; ++l) all = next(all, lane(l));
    for (int l = 0; l < 32; ++l) lane(l) = all;
  });
  return mine;
}
inline uint32_t ballot(bool vote, Site at = Site::current()) {
  return fold("ballot", vote ? 1u << lane() : 0u, at, [](uint32_t a, uint32_t b) { return a | b; });
}
inline bool any(bool vote, Site at = Site::current()) {
  return fold("any", vote, at, [](bool a, bool b) { return a || b; });
}
inline bool all(bool vote, Site at = Site::current()) {
  return fold("all", vote, at, [](bool a, bool b) { return a && b; });
}
template <class T>
T reduce_add(T value, Site at = Site::current()) {
  static_assert(sizeof(T) == 4 && static_cast<T>(1) / 2 == 0, "int or uint32_t");
  return fold("reduce_add", value, at, [](T a, T b) { return static_cast<T>(uint32_t(a) + uint32_t(b)); });
}
template <class T>
T reduce_min(T value, Site at = Site::current()) {
  static_assert(sizeof(T) == 4 && static_cast<T>(1) / 2 == 0, "int or uint32_t");
  return fold("reduce_min", value, at, [](T a, T b) { return a < b ? a : b; });
}
template <class T>
T reduce_max(T value, Site at = Site::current()) {
  static_assert(sizeof(T) == 4 && static_cast<T>(1) / 2 == 0, "int or uint32_t");
  return fold("reduce_max", value, at, [](T a, T b) { return a < b ? b : a; });
}

// --- asynchronous copies ---
template <int Bytes, class T>
void cp_async(Shared<T> dst, const void* src, int src_bytes, Site at = Site::current()) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "4, 8 or 16 bytes");
  simt::copy_issue(dst.offset, src, Bytes, src_bytes, at);
}
template <int Bytes, class T>
void cp_async(Shared<T> dst, const void* src, Site at = Site::current()) {
  cp_async<Bytes>(dst, src, Bytes, at);
}
inline void cp_async_commit() { simt::copy_commit(); }
template <int N>
void cp_async_wait() {
  simt::copy_wait(N);
}

// --- numbers: any NaN becomes 0x7fff, as the device's conversions do ---
inline uint32_t float_bits(float x) {
  uint32_t u;
  memcpy(&u, &x, 4);
  return u;
}
inline float bits_float(uint32_t u) {
  float x;
  memcpy(&x, &u, 4);
  return x;
}
inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_float(static_cast<uint32_t>(x.bits) << 16); }
inline float to_float(f16 x) {
  const int exponent = x.bits >> 10 & 31, fraction = x.bits & 1023;
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  if (exponent == 31) return bits_float(sign | 0x7f800000u | static_cast<uint32_t>(fraction) << 13);
  const float magnitude = exponent ? ldexpf(static_cast<float>(1024 + fraction), exponent - 25)
                                   : ldexpf(static_cast<float>(fraction), -24);
  return bits_float(sign | float_bits(magnitude));
}
template <class T>
T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  if (x != x) return {0x7fff};
  const uint32_t u = float_bits(x), rest = u & 0xffffu,
                 up = rest > 0x8000u || (rest == 0x8000u && (u >> 16 & 1u));
  return {static_cast<uint16_t>((u >> 16) + up)};
}
template <>
inline f16 from_float<f16>(float x) {
  if (x != x) return {0x7fff};
  const uint16_t sign = static_cast<uint16_t>(float_bits(x) >> 16 & 0x8000u);
  const float magnitude = fabsf(x);
  if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00u)};
  int exponent = 0;
  frexpf(magnitude, &exponent);                                  // magnitude in [2^(exponent-1), 2^exponent)
  const int scale = magnitude < 0x1p-14f ? -24 : exponent - 11;  // weight of the last bit
  const auto units =
      static_cast<uint32_t>(nearbyintf(ldexpf(magnitude, -scale)));  // to nearest, ties to even
  return {static_cast<uint16_t>(sign | (((scale + 24) << 10) + units))};
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
template <class T>
Vec<float, 2> unpack(uint32_t pair) {
  return {{to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})}};
}

inline uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector, Site at = Site::current()) {
  if (selector & ~0x7777u)
    simt::fail(simt::Kind::operand, at, "selector 0x%x; four nibbles of 0 to 7", selector);
  const uint64_t both = uint64_t{b} << 32 | a;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= (both >> 8 * (selector >> 4 * i & 7u) & 255u) << 8 * i;
  return out;
}

inline float fma(float a, float b, float c) { return fmaf(a, b, c); }
inline float rcp(float x) { return 1.0f / x; }
inline float exp2(float x) { return exp2f(x); }
inline float exp(float x) { return expf(x); }
inline float rsqrt(float x) { return 1.0f / sqrtf(x); }
inline float erf(float x) { return erff(x); }
inline float tanh(float x) { return tanhf(x); }

// --- matrix ---
template <int Count, bool Trans = false, class T>
void ldmatrix(uint32_t (&r)[Count], Shared<T> row, Site at = Site::current()) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "x1, x2 or x4");
  struct Lane {
    uint32_t offset, *r;
  } mine{row.offset, r};
  simt::collective(Trans ? "ldmatrix_trans" : "ldmatrix", mine, at, [&](auto lane) {
    uint32_t offsets[32];
    unsigned char rows[8 * Count][16];
    for (int i = 0; i < 8 * Count; ++i) offsets[i] = lane(i).offset;
    simt::matrix_read(rows, offsets, 8 * Count, at);
    for (int l = 0; l < 32; ++l)
      for (int i = 0; i < Count; ++i)
        for (int h = 0; h < 2; ++h) {
          const int g = l / 4, c = 2 * (l % 4) + h;
          memcpy(reinterpret_cast<char*>(lane(l).r + i) + 2 * h,
                 rows[8 * i + (Trans ? c : g)] + 2 * (Trans ? g : c), 2);
        }
  });
}

template <int K, int Per, bool Sparse, class D, class Value>
void matrix(const char* operation, simt::Fragments mine, int selector, Value value, Site at) {
  simt::collective(operation, mine, at, [&](auto lane) {
    simt::count_matrix(operation);
    simt::Position bad{};
    if (!simt::multiply<K, Per, Sparse, D>(lane, selector, value, &bad))
      simt::fail(simt::Kind::operand, at,
                 "illegal metadata nibble 0x%x for row %d, dense columns %d..%d: two increasing positions, "
                 "p0 | p1 << 2 with "
                 "p0 < p1; look at the selector (%d) and at the lane's word",
                 simt::nibble(lane, bad.row, bad.column, Per, selector), bad.row, 4 * bad.column,
                 4 * bad.column + 3, selector);
  });
}
template <class T>
double number16(uint32_t bits) {
  return to_float(T{static_cast<uint16_t>(bits)});
}
inline int64_t number8(uint32_t bits) { return static_cast<int8_t>(bits); }

template <class T>
void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Site at = Site::current()) {
  matrix<16, 2, false, float>("mma_m16n8k16", {a, b, d, 0}, 0, number16<T>, at);
}
template <class T, int Selector>
void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta,
                     Site at = Site::current()) {
  static_assert(Selector == 0 || Selector == 1,
                "lanes 2 Selector and 2 Selector + 1 of four hold the metadata");
  matrix<32, 2, true, float>("mma_sp_m16n8k32", {a, b, d, meta}, Selector, number16<T>, at);
}
inline void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                         Site at = Site::current()) {
  matrix<32, 4, false, int>("mma_m16n8k32", {a, b, d, 0}, 0, number8, at);
}
inline void mma_sp_m16n8k64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4], uint32_t meta,
                            Site at = Site::current()) {
  matrix<64, 4, true, int>("mma_sp_m16n8k64", {a, b, d, meta}, 0, number8, at);
}

// --- atomics ---
template <class T, class Next>
T update(void* at, Next next) {
  T old, now;
  memcpy(&old, at, sizeof(T));
  now = next(old);
  memcpy(at, &now, sizeof(T));
  return old;
}
template <class T>
T atomic_add(T* p, T value, Site at = Site::current()) {
  return update<T>(simt::global_atomic(p, sizeof(T), at), [=](T old) { return old + value; });
}
template <class T>
T atomic_max(T* p, T value, Site at = Site::current()) {
  return update<T>(simt::global_atomic(p, sizeof(T), at), [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomic_cas(T* p, T expected, T value, Site at = Site::current()) {
  return update<T>(simt::global_atomic(p, sizeof(T), at),
                   [=](T old) { return old == expected ? value : old; });
}
template <class T>
T atomic_add(Shared<T> p, T value, Site at = Site::current()) {
  return update<T>(simt::shared_atomic(p.offset, sizeof(T), at), [=](T old) { return old + value; });
}
template <class T>
T atomic_max(Shared<T> p, T value, Site at = Site::current()) {
  return update<T>(simt::shared_atomic(p.offset, sizeof(T), at),
                   [=](T old) { return old < value ? value : old; });
}
template <class T>
T atomic_cas(Shared<T> p, T expected, T value, Site at = Site::current()) {
  return update<T>(simt::shared_atomic(p.offset, sizeof(T), at),
                   [=](T old) { return old == expected ? value : old; });
}

}  // namespace lissom::dev
