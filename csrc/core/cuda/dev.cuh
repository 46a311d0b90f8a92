// SPDX-License-Identifier: Apache-2.0
// Thin device layer: the only file with inline asm or CUDA spelling. Kernels include this and plain headers, nothing else, so
// that the same source is compiled by nvcc and, with -DLISSOM_SIMT, runs as C++ on the executor in tests/simt.
//
// Rules for kernels:
//   * Shared memory is the one dynamic block, reached by byte offset: shared<T>(offset). No __shared__ arrays.
//   * No lockstep: what one thread stores to shared memory another may read only behind a barrier (or, inside a warp, a
//     warp_sync). Collectives (shuffle, ballot, ldmatrix, mma...) are reached by all 32 lanes at the same source line.
//   * load() and load_stream() take the read-only path: nobody in this launch may write those bytes.
//   * Only the sm_80 instruction set. Kernels live inside namespace lissom and name these functions dev::... or unqualified;
//     at global scope the CUDA headers have functions of the same names (exp2, any, ...).
//
// Fragments, with g = lane / 4, t = lane % 4 and h the half (or byte e) of a register, lowest first:
//   16-bit   A[r] = (g + 8 (r & 1), 2t + h + 8 (r >> 1))    B[r] = (k = 2t + h + 8r, n = g)
//   8-bit    A[r] = (g + 8 (r & 1), 4t + e + 16 (r >> 1))   B[r] = (k = 4t + e + 16r, n = g)
//   C, D     [r] = (g + 8 (r >> 1), 2t + (r & 1))
// Sparse A is the compressed matrix in the same map; B covers all dense rows. Metadata: see mma_sp_*.
#pragma once

#include <stdint.h>
#include <string.h>

#if defined(LISSOM_SIMT)
#define LISSOM_BOTH
#else
#include <cuda_runtime.h>
#define LISSOM_BOTH __host__ __device__
#endif

namespace lissom::dev {

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

struct Grid {
  int64_t x = 1, y = 1, z = 1;
};

// N elements that travel as one access; 2, 4, 8 or 16 bytes, aligned to their size.
template <class T, int N>
struct alignas(sizeof(T) * N) Vec {
  static_assert(sizeof(T) * N <= 16 && (sizeof(T) * N & (sizeof(T) * N - 1)) == 0,
                "one access: 1 to 16 bytes");
  T v[N];
  LISSOM_BOTH constexpr T& operator[](int i) { return v[i]; }
  LISSOM_BOTH constexpr const T& operator[](int i) const { return v[i]; }
};

constexpr int kOptInBytes = 48 * 1024;  // more dynamic shared memory than this must be asked for

}  // namespace lissom::dev

#if defined(LISSOM_SIMT)
#include "dev_simt.h"
#else

#define LISSOM_KERNEL(max_threads, min_blocks) __global__ void __launch_bounds__(max_threads, min_blocks)
#define LISSOM_DEVICE __device__ __forceinline__
#define LISSOM_UNROLL _Pragma("unroll")

namespace lissom::dev {

// --- launch: asynchronous, on `stream`; the cudaError_t of this launch as int ---
template <class... P, class... A>
int launch(void (*kernel)(P...), Grid grid, int threads, int shared_bytes, void* stream, A... args) {
  const void* entry = reinterpret_cast<const void*>(kernel);
  if (shared_bytes > kOptInBytes) {
    const auto error = cudaFuncSetAttribute(entry, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
    if (error != cudaSuccess) return error;
  }
  const int64_t limit[3] = {0x7fffffff, 65535, 65535}, wanted[3] = {grid.x, grid.y, grid.z};
  for (int i = 0; i < 3; ++i)
    if (wanted[i] < 1 || wanted[i] > limit[i]) return cudaErrorInvalidConfiguration;
  const auto start = [&](P... converted) {
    void* pointers[] = {const_cast<void*>(static_cast<const void*>(&converted))...};
    return cudaLaunchKernel(entry, dim3(grid.x, grid.y, grid.z), dim3(threads), pointers, shared_bytes,
                            static_cast<cudaStream_t>(stream));
  };
  return start(args...);
}

// --- index ---
LISSOM_DEVICE int thread() { return threadIdx.x; }
LISSOM_DEVICE int lane() { return threadIdx.x & 31; }
LISSOM_DEVICE int warp() { return threadIdx.x >> 5; }
LISSOM_DEVICE int threads() { return blockDim.x; }
LISSOM_DEVICE int block_x() { return blockIdx.x; }
LISSOM_DEVICE int block_y() { return blockIdx.y; }
LISSOM_DEVICE int block_z() { return blockIdx.z; }
LISSOM_DEVICE int grid_x() { return gridDim.x; }
LISSOM_DEVICE int grid_y() { return gridDim.y; }
LISSOM_DEVICE int grid_z() { return gridDim.z; }

// --- shared memory: a typed byte offset into the dynamic block, so that each access is known to be shared ---
LISSOM_DEVICE unsigned char* dynamic_shared() {
  extern __shared__ __align__(1024) unsigned char lissom_dynamic_shared[];
  return lissom_dynamic_shared;
}

template <class T>
struct Shared {
  uint32_t offset;  // bytes

  LISSOM_DEVICE Shared operator+(int elements) const {
    return {offset + elements * static_cast<uint32_t>(sizeof(T))};
  }
  template <class U>
  LISSOM_DEVICE Shared<U> as() const {
    return {offset};
  }
  LISSOM_DEVICE T* pointer(int i) const { return reinterpret_cast<T*>(dynamic_shared() + offset) + i; }
  LISSOM_DEVICE T load(int i = 0) const { return *pointer(i); }
  LISSOM_DEVICE void store(int i, T value) const { *pointer(i) = value; }
  LISSOM_DEVICE uint32_t address() const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(dynamic_shared())) + offset;
  }
};

template <class T>
LISSOM_DEVICE Shared<T> shared(int byte_offset) {
  return {static_cast<uint32_t>(byte_offset)};
}

// --- global memory: T of 1, 2, 4, 8 or 16 bytes, aligned to its size ---
template <int Bytes>
struct RawOf;
template <>
struct RawOf<1> {
  using type = unsigned char;
};
template <>
struct RawOf<2> {
  using type = unsigned short;
};
template <>
struct RawOf<4> {
  using type = unsigned int;
};
template <>
struct RawOf<8> {
  using type = uint2;
};
template <>
struct RawOf<16> {
  using type = uint4;
};
template <class T>
using Raw = typename RawOf<sizeof(T)>::type;

template <class T, class R>
LISSOM_DEVICE T from_raw(R raw) {
  T value;
  memcpy(&value, &raw, sizeof(T));
  return value;
}

template <class T>
LISSOM_DEVICE T load(const T* p) {
  return from_raw<T>(__ldg(reinterpret_cast<const Raw<T>*>(p)));
}

// Read-only data that is used once: does not displace L1.
template <class T>
LISSOM_DEVICE T load_stream(const T* p) {
  static_assert(sizeof(T) == 4 || sizeof(T) == 8 || sizeof(T) == 16, "4, 8 or 16 bytes");
  const auto at = __cvta_generic_to_global(p);
  uint32_t r[sizeof(T) / 4];
  if constexpr (sizeof(T) == 4)
    asm volatile("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(r[0]) : "l"(at));
  else if constexpr (sizeof(T) == 8)
    asm volatile("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(r[0]), "=r"(r[1]) : "l"(at));
  else
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "l"(at));
  T value;
  memcpy(&value, r, sizeof(T));
  return value;
}

// Data that threads of this block may have written in this launch, behind a barrier.
template <class T>
LISSOM_DEVICE T load_plain(const T* p) {
  return *p;
}

template <class T>
LISSOM_DEVICE void store(T* p, T value) {
  *p = value;
}

// --- block ---
LISSOM_DEVICE void barrier() { __syncthreads(); }
// Named barriers 1 to 15; `count` threads in all, a multiple of 32; whole warps take part.
LISSOM_DEVICE void barrier_sync(int id, int count) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(count) : "memory");
}
LISSOM_DEVICE void barrier_arrive(int id, int count) {
  asm volatile("bar.arrive %0, %1;" ::"r"(id), "r"(count) : "memory");
}

// --- warp: all 32 lanes ---
constexpr uint32_t kFullMask = 0xffffffffu;
LISSOM_DEVICE void warp_sync() { __syncwarp(kFullMask); }
template <class T>
LISSOM_DEVICE T shuffle(T value, int source_lane, int width = 32) {
  return __shfl_sync(kFullMask, value, source_lane, width);
}
template <class T>
LISSOM_DEVICE T shuffle_xor(T value, int lane_mask, int width = 32) {
  return __shfl_xor_sync(kFullMask, value, lane_mask, width);
}
template <class T>
LISSOM_DEVICE T shuffle_up(T value, int delta, int width = 32) {
  return __shfl_up_sync(kFullMask, value, delta, width);
}
template <class T>
LISSOM_DEVICE T shuffle_down(T value, int delta, int width = 32) {
  return __shfl_down_sync(kFullMask, value, delta, width);
}
LISSOM_DEVICE uint32_t ballot(bool vote) { return __ballot_sync(kFullMask, vote); }
LISSOM_DEVICE bool any(bool vote) { return __any_sync(kFullMask, vote); }
LISSOM_DEVICE bool all(bool vote) { return __all_sync(kFullMask, vote); }
// Integers only (int or uint32_t).
template <class T>
LISSOM_DEVICE T reduce_add(T value) {
  return __reduce_add_sync(kFullMask, value);
}
template <class T>
LISSOM_DEVICE T reduce_min(T value) {
  return __reduce_min_sync(kFullMask, value);
}
template <class T>
LISSOM_DEVICE T reduce_max(T value) {
  return __reduce_max_sync(kFullMask, value);
}

// --- asynchronous copies, global to shared; both addresses aligned to Bytes ---
template <int Bytes, class T>
LISSOM_DEVICE void cp_async(Shared<T> dst, const void* src) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "4, 8 or 16 bytes");
  const auto from = __cvta_generic_to_global(src);
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(dst.address()), "l"(from) : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(dst.address()), "l"(from), "n"(Bytes)
                 : "memory");
}
// Reads src_bytes (0 to Bytes) and fills the rest with zeros; `src` must be a valid address even when src_bytes is 0.
template <int Bytes, class T>
LISSOM_DEVICE void cp_async(Shared<T> dst, const void* src, int src_bytes) {
  static_assert(Bytes == 4 || Bytes == 8 || Bytes == 16, "4, 8 or 16 bytes");
  const auto from = __cvta_generic_to_global(src);
  if constexpr (Bytes == 16)
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(dst.address()), "l"(from),
                 "r"(src_bytes)
                 : "memory");
  else
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2, %3;" ::"r"(dst.address()), "l"(from), "n"(Bytes),
                 "r"(src_bytes)
                 : "memory");
}
LISSOM_DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until at most N of this thread's newest groups are unfinished. Others see the data behind a barrier that follows.
template <int N>
LISSOM_DEVICE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// --- matrix ---
// Count 8x8 matrices of 16-bit elements; lane l gives row l % 8 of matrix l / 8, 16 bytes, aligned. Register i of a lane:
// elements [g][2t + h] of matrix i, or [2t + h][g] with Trans.
template <int Count, bool Trans = false, class T>
LISSOM_DEVICE void ldmatrix(uint32_t (&r)[Count], Shared<T> row) {
  static_assert(Count == 1 || Count == 2 || Count == 4, "x1, x2 or x4");
  const uint32_t at = row.address();
  if constexpr (Count == 1 && !Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];" : "=r"(r[0]) : "r"(at) : "memory");
  else if constexpr (Count == 1)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
                 : "=r"(r[0])
                 : "r"(at)
                 : "memory");
  else if constexpr (Count == 2 && !Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (Count == 2)
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(r[0]), "=r"(r[1])
                 : "r"(at)
                 : "memory");
  else if constexpr (!Trans)
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
  else
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(at)
                 : "memory");
}

#define LISSOM_MMA_D(c) "+" c(d[0]), "+" c(d[1]), "+" c(d[2]), "+" c(d[3])
#define LISSOM_MMA_A "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])
#define LISSOM_MMA_DENSE(shape, types, c)                                         \
  asm volatile("mma.sync.aligned." shape ".row.col." types                        \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : LISSOM_MMA_D(c)                                                  \
               : LISSOM_MMA_A, "r"(b[0]), "r"(b[1]))
#define LISSOM_MMA_SPARSE(shape, types, c, selector)                                                  \
  asm volatile("mma.sp::ordered_metadata.sync.aligned." shape ".row.col." types                       \
               " {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
               : LISSOM_MMA_D(c)                                                                      \
               : LISSOM_MMA_A, "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]), "r"(meta), "n"(selector))

template <class T>
constexpr bool kIsBf16 = false;
template <>
constexpr bool kIsBf16<bf16> = true;

// D[16, 8] += A[16, 16] B[16, 8]
template <class T>
LISSOM_DEVICE void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kIsBf16<T>)
    LISSOM_MMA_DENSE("m16n8k16", "f32.bf16.bf16.f32", "f");
  else
    LISSOM_MMA_DENSE("m16n8k16", "f32.f16.f16.f32", "f");
}
// D[16, 8] += A[16, 32] B[32, 8] with A 2:4. Lanes with t = 2 Selector + s give the metadata, the others' is ignored: dense
// columns 16s .. 16s+15, row g in bits 0-15 and row g + 8 in bits 16-31, one nibble p0 | p1 << 2 (p0 < p1) a quad.
template <class T, int Selector>
LISSOM_DEVICE void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                   uint32_t meta) {
  static_assert(Selector == 0 || Selector == 1,
                "lanes 2 Selector and 2 Selector + 1 of four hold the metadata");
  if constexpr (kIsBf16<T>)
    LISSOM_MMA_SPARSE("m16n8k32", "f32.bf16.bf16.f32", "f", Selector);
  else
    LISSOM_MMA_SPARSE("m16n8k32", "f32.f16.f16.f32", "f", Selector);
}
// int8: D[16, 8] += A[16, 32] B[32, 8]
LISSOM_DEVICE void mma_m16n8k32(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  LISSOM_MMA_DENSE("m16n8k32", "s32.s8.s8.s32", "r");
}
// int8: D[16, 8] += A[16, 64] B[64, 8] with A 2:4. All lanes give metadata: lane 4g + t for row g + 8 (t & 1), dense columns
// 32 (t >> 1) .. +31, the same nibbles.
LISSOM_DEVICE void mma_sp_m16n8k64(int (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                   uint32_t meta) {
  LISSOM_MMA_SPARSE("m16n8k64", "s32.s8.s8.s32", "r", 0);
}

#undef LISSOM_MMA_SPARSE
#undef LISSOM_MMA_DENSE
#undef LISSOM_MMA_A
#undef LISSOM_MMA_D

// --- numbers: conversions round to nearest even, any NaN becomes 0x7fff ---
LISSOM_DEVICE float to_float(float x) { return x; }
LISSOM_DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
LISSOM_DEVICE float to_float(f16 x) {
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(x.bits));
  return f;
}
template <class T>
LISSOM_DEVICE T from_float(float x) {
  if constexpr (sizeof(T) == 4) {
    return x;
  } else {
    T y;
    if constexpr (kIsBf16<T>)
      asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    else
      asm("cvt.rn.f16.f32 %0, %1;" : "=h"(y.bits) : "f"(x));
    return y;
  }
}
// A pair as one register, `low` in bits 0-15.
template <class T>
LISSOM_DEVICE uint32_t pack(float low, float high) {
  uint32_t pair;
  if constexpr (kIsBf16<T>)
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  else
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
}
template <class T>
LISSOM_DEVICE Vec<float, 2> unpack(uint32_t pair) {
  return {{to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)})}};
}
LISSOM_DEVICE uint32_t float_bits(float x) { return __float_as_uint(x); }
LISSOM_DEVICE float bits_float(uint32_t u) { return __uint_as_float(u); }

// Byte i of the result is byte (selector >> 4i & 7) of the eight bytes b:a, a low. The other selector bits are 0.
LISSOM_DEVICE uint32_t permute_bytes(uint32_t a, uint32_t b, uint32_t selector) {
  return __byte_perm(a, b, selector);
}

LISSOM_DEVICE float fma(float a, float b, float c) { return __fmaf_rn(a, b, c); }
LISSOM_DEVICE float rcp(float x) { return __frcp_rn(x); }
// Right to 2 units in the last place; not bit for bit those of the host executor.
LISSOM_DEVICE float exp2(float x) { return exp2f(x); }
LISSOM_DEVICE float exp(float x) { return expf(x); }
LISSOM_DEVICE float rsqrt(float x) { return rsqrtf(x); }
LISSOM_DEVICE float erf(float x) { return erff(x); }
LISSOM_DEVICE float tanh(float x) { return tanhf(x); }

// --- atomics: relaxed, return the old value. T is int or uint32_t, for add also float ---
template <class T>
LISSOM_DEVICE T atomic_add(T* p, T value) {
  return atomicAdd(p, value);
}
template <class T>
LISSOM_DEVICE T atomic_max(T* p, T value) {
  return atomicMax(p, value);
}
template <class T>
LISSOM_DEVICE T atomic_cas(T* p, T expected, T value) {
  return atomicCAS(p, expected, value);
}
template <class T>
LISSOM_DEVICE T atomic_add(Shared<T> p, T value) {
  return atomicAdd(p.pointer(0), value);
}
template <class T>
LISSOM_DEVICE T atomic_max(Shared<T> p, T value) {
  return atomicMax(p.pointer(0), value);
}
template <class T>
LISSOM_DEVICE T atomic_cas(Shared<T> p, T expected, T value) {
  return atomicCAS(p.pointer(0), expected, value);
}

}  // namespace lissom::dev
#endif  // LISSOM_SIMT
