// SPDX-License-Identifier: Apache-2.0
// Every wrapper of dev.cuh once, so that its asm text is executed; test_dev.py compares and counts.
#include "core/cuda/dev.cuh"

namespace lissom {

using namespace dev;

LISSOM_KERNEL(96, 1) index_check(int* out) {
  const int block = block_x() + grid_x() * (block_y() + grid_y() * block_z());
  int* row = out + (block * threads() + thread()) * 8;
  const int values[8] = {thread(), lane(), warp(), threads(), block, grid_x(), grid_y(), grid_z()};
  LISSOM_UNROLL for (int i = 0; i < 8; ++i) store(row + i, values[i]);
}

// Each width, through shared memory and back: lane i moves element i.
template <class T>
LISSOM_DEVICE void move_one(const unsigned char* in, unsigned char* out, int at, bool stream) {
  const T* from = reinterpret_cast<const T*>(in + at * 64);
  T* to = reinterpret_cast<T*>(out + at * 64);
  const Shared<T> s = shared<T>(at * 64);
  T value = load(from + thread());
  if constexpr (sizeof(T) >= 4)
    if (stream) value = load_stream(from + thread());
  s.store(thread(), value);
  warp_sync();
  store(to + thread(), (s + 1).load(thread() == 31 ? -1 : thread()));  // the next lane's
}
LISSOM_KERNEL(32, 1) memory_check(const unsigned char* in, unsigned char* out) {
  move_one<uint8_t>(in, out, 0, false);
  move_one<uint16_t>(in, out, 1, false);
  move_one<uint32_t>(in, out, 2, false);
  move_one<Vec<uint32_t, 2>>(in, out, 4, false);
  move_one<Vec<uint32_t, 4>>(in, out, 8, false);
  move_one<uint32_t>(in, out, 16, true);
  move_one<Vec<uint32_t, 2>>(in, out, 18, true);
  move_one<Vec<uint32_t, 4>>(in, out, 22, true);
  warp_sync();
  const Shared<uint16_t> halves = shared<uint32_t>(128).as<uint16_t>();
  store(out + 30 * 64 + thread(), static_cast<unsigned char>(halves.load(thread())));
  barrier();
  store(out + 31 * 64 + thread(), load_plain(out + 30 * 64 + (thread() ^ 1)));
}

// Warp 0 hands over to warp 1 by barrier 1, and gets an answer by barrier 2.
LISSOM_KERNEL(64, 1) barrier_check(int* out) {
  const Shared<int> s = shared<int>(0);
  if (warp() == 0) {
    s.store(lane(), 100 + lane());
    barrier_arrive(1, 64);
    barrier_sync(2, 64);
    store(out + lane(), s.load(32 + lane()));
  } else {
    barrier_sync(1, 64);
    s.store(32 + lane(), s.load(31 - lane()));
    barrier_arrive(2, 64);
  }
}

LISSOM_KERNEL(32, 1) warp_check(const int* in, int* out) {
  const int v = load(in + lane());
  const bool odd = v & 1;
  const int values[12] = {shuffle(v, 5),
                          shuffle(v, lane() + 1, 8),
                          shuffle_xor(v, 4),
                          shuffle_up(v, 3),
                          shuffle_down(v, 2, 16),
                          static_cast<int>(ballot(odd)),
                          any(v > 90) + 2 * all(v >= 0) + 4 * any(v > 1000) + 8 * all(v > 50),
                          reduce_add(v),
                          reduce_min(v),
                          reduce_max(v),
                          static_cast<int>(permute_bytes(v * 0x01020304u, 0x55667788u, 0x5146u)),
                          static_cast<int>(reduce_add(static_cast<uint32_t>(v)))};
  LISSOM_UNROLL for (int i = 0; i < 12; ++i) store(out + i * 32 + lane(), values[i]);
}

// Copies of 4, 8 and 16 bytes, whole and with `bytes` of them.
LISSOM_KERNEL(32, 1) copy_check(const unsigned char* in, unsigned char* out, int bytes) {
  const Shared<unsigned char> s = shared<unsigned char>(0);
  const int i = thread();
  cp_async<4>(s + 4 * i, in + 4 * i);
  cp_async<8>(s + 128 + 8 * i, in + 8 * i);
  cp_async_commit();
  cp_async<16>(s + 512 + 16 * i, in + 16 * i);
  cp_async_commit();
  cp_async<4>(s + 1024 + 4 * i, in + 4 * i, min(bytes, 4));
  cp_async<8>(s + 1152 + 8 * i, in + 8 * i, min(bytes, 8));
  cp_async<16>(s + 1536 + 16 * i, in + 16 * i, bytes);
  cp_async_commit();
  cp_async_wait<1>();
  barrier();
  for (int j = i; j < 384; j += 32) store(out + j, s.load(j));
  for (int j = 512 + i; j < 1024; j += 32) store(out + j, s.load(j));
  cp_async_wait<0>();
  barrier();
  for (int j = 1024 + i; j < 1408; j += 32) store(out + j, s.load(j));
  for (int j = 1536 + i; j < 2048; j += 32) store(out + j, s.load(j));
}

template <int Count, bool Trans>
LISSOM_DEVICE void matrix_one(Shared<uint16_t> row, uint32_t* out) {
  uint32_t r[Count];
  ldmatrix<Count, Trans>(r, row);
  LISSOM_UNROLL for (int i = 0; i < Count; ++i) store(out + i * 32 + lane(), r[i]);
}
// in: 32 rows of 8 elements, the rows of four matrices.
LISSOM_KERNEL(32, 1) ldmatrix_check(const uint16_t* in, uint32_t* out) {
  const Shared<uint16_t> s = shared<uint16_t>(0);
  for (int i = 0; i < 8; ++i) s.store(8 * lane() + i, load(in + 8 * lane() + i));
  warp_sync();
  const Shared<uint16_t> row = s + 8 * lane();
  matrix_one<1, false>(row, out);
  matrix_one<2, false>(row, out + 32);
  matrix_one<4, false>(row, out + 96);
  matrix_one<1, true>(row, out + 224);
  matrix_one<2, true>(row, out + 256);
  matrix_one<4, true>(row, out + 320);
}

// W [32, K / 2] 2:4 by `meta` (torch's CUTLASS words, one a lane) and dense x [8, K], both row-major: y [32, 8], both selectors.
template <class T>
LISSOM_DEVICE void sparse_half(const T* w, const T* x, const uint32_t* meta, float* y) {
  const Shared<uint16_t> s = shared<uint16_t>(0), values = s, dense = s + 32 * 16;
  for (int i = lane(); i < 32 * 16; i += 32) values.store(i, load(w + i).bits);
  for (int i = lane(); i < 8 * 32; i += 32) dense.store(i, load(x + i).bits);
  warp_sync();
  uint32_t b[4];
  ldmatrix<4>(b, dense + (lane() % 8) * 32 + lane() / 8 * 8);
  LISSOM_UNROLL for (int half = 0; half < 2; ++half) {
    uint32_t a[4];
    ldmatrix<4>(a, values + (16 * half + lane() % 16) * 16 + lane() / 16 * 8);
    float d[4] = {0, 0, 0, 0};
    if (half == 0)
      mma_sp_m16n8k32<T, 0>(d, a, b, load(meta + lane()));
    else
      mma_sp_m16n8k32<T, 1>(d, a, b, load(meta + lane()));
    LISSOM_UNROLL for (int r = 0; r < 4; ++r)
        store(y + (16 * half + lane() / 4 + 8 * (r >> 1)) * 8 + 2 * (lane() % 4) + (r & 1), d[r]);
  }
}
LISSOM_KERNEL(32, 1) sparse_f16_check(const f16* w, const f16* x, const uint32_t* meta, float* y) {
  sparse_half(w, x, meta, y);
}
LISSOM_KERNEL(32, 1) sparse_bf16_check(const bf16* w, const bf16* x, const uint32_t* meta, float* y) {
  sparse_half(w, x, meta, y);
}

// a [16, 16], b [8, 16] (n, k), both row-major: y = a b^T + y.
template <class T>
LISSOM_DEVICE void dense_half(const T* a_in, const T* b_in, float* y) {
  const Shared<uint16_t> s = shared<uint16_t>(0);
  for (int i = lane(); i < 256; i += 32) s.store(i, load(a_in + i).bits);
  for (int i = lane(); i < 128; i += 32) s.store(256 + i, load(b_in + i).bits);
  warp_sync();
  uint32_t a[4], b[2];
  ldmatrix<4>(a, s + (lane() % 16) * 16 + lane() / 16 * 8);
  ldmatrix<2>(b, s + 256 + (lane() % 8) * 16 + lane() / 8 % 2 * 8);
  float d[4];
  float* at[4];
  LISSOM_UNROLL for (int r = 0; r < 4; ++r) {
    at[r] = y + (lane() / 4 + 8 * (r >> 1)) * 8 + 2 * (lane() % 4) + (r & 1);
    d[r] = load_plain(at[r]);
  }
  mma_m16n8k16<T>(d, a, b);
  LISSOM_UNROLL for (int r = 0; r < 4; ++r) store(at[r], d[r]);
}
LISSOM_KERNEL(32, 1) dense_f16_check(const f16* a, const f16* b, float* y) { dense_half(a, b, y); }
LISSOM_KERNEL(32, 1) dense_bf16_check(const bf16* a, const bf16* b, float* y) { dense_half(a, b, y); }

// int8: w [16, 32] kept of 64 columns, or dense [16, 32]; x [8, 64] or [8, 32]. Bytes travel as pairs through ldmatrix.
LISSOM_KERNEL(32, 1) sparse_s8_check(const uint16_t* w, const uint16_t* x, const uint32_t* meta, int* y) {
  const Shared<uint16_t> s = shared<uint16_t>(0);
  for (int i = lane(); i < 256; i += 32) s.store(i, load(w + i));
  for (int i = lane(); i < 256; i += 32) s.store(256 + i, load(x + i));
  warp_sync();
  uint32_t a[4], b[4], dense_b[2];
  ldmatrix<4>(a, s + (lane() % 16) * 16 + lane() / 16 * 8);
  ldmatrix<4>(b, s + 256 + (lane() % 8) * 32 + lane() / 8 * 8);
  dense_b[0] = b[0];
  dense_b[1] = b[1];
  int d[4] = {0, 0, 0, 0}, e[4] = {7, 7, 7, 7};
  mma_sp_m16n8k64(d, a, b, load(meta + lane()));
  mma_m16n8k32(e, a, dense_b);
  LISSOM_UNROLL for (int r = 0; r < 4; ++r) {
    const int at = (lane() / 4 + 8 * (r >> 1)) * 8 + 2 * (lane() % 4) + (r & 1);
    store(y + at, d[r]);
    store(y + 128 + at, e[r]);
  }
}

LISSOM_KERNEL(32, 1) number_check(const float* in, float* out, uint32_t* pairs) {
  const float x = load(in + lane());
  const Vec<float, 2> halves = unpack<f16>(pack<f16>(x, -x)), brains = unpack<bf16>(pack<bf16>(x, -x));
  const float values[16] = {to_float(from_float<f16>(x)),
                            to_float(from_float<bf16>(x)),
                            to_float(x),
                            from_float<float>(x),
                            halves[0],
                            halves[1],
                            brains[0],
                            brains[1],
                            dev::fma(x, x, 1.0f),
                            rcp(x),
                            dev::exp2(x),
                            dev::exp(x),
                            rsqrt(x * x),
                            dev::erf(x),
                            dev::tanh(x),
                            bits_float(float_bits(x) ^ 0x80000000u)};
  LISSOM_UNROLL for (int i = 0; i < 16; ++i) store(out + i * 32 + lane(), values[i]);
  store(pairs + lane(), pack<f16>(x, 1.0f));
}

LISSOM_KERNEL(64, 1) atomic_check(int* out, float* sum) {
  const Shared<int> s = shared<int>(0);
  if (thread() < 4) s.store(thread(), 0);
  barrier();
  atomic_add(s, thread());
  atomic_max(s + 1, thread());
  atomic_cas(s + 2, 0, 1 + thread());
  atomic_add((s + 3).as<float>(), 0.5f);
  barrier();
  if (thread() < 4) store(out + thread(), s.load(thread()));
  atomic_add(out + 4, 2);
  atomic_max(reinterpret_cast<uint32_t*>(out + 5), static_cast<uint32_t>(thread()));
  atomic_cas(out + 6, 0, 1 + thread());
  atomic_add(sum, 0.25f);
}

}  // namespace lissom
