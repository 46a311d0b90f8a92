// SPDX-License-Identifier: Apache-2.0
// Three small kernels that use most of dev.cuh, each with faults that a template argument plants. `Plant::nothing` is right.
#pragma once

#include "core/cuda/dev.cuh"

namespace lissom::plants {

enum class Plant {
  nothing,
  // sum
  no_barrier,
  store_past_end,
  shuffle_in_branch,
  barrier_in_branch,
  two_barriers,
  return_before_barrier,
  uninitialised_slot,
  same_output,
  read_only_output,
  misaligned_load,
  // relay
  arrive_only,
  late_arrive,
  named_count,
  half_warp,
  no_warp_sync,
  plain_count,
  // ring
  load_before_barrier,
  weak_wait,
  no_wait,
  no_commit,
  no_loop_barrier,
  no_reuse_barrier,
  no_read_barrier,
  source_past_end,
  shifted_source,
  too_many_bytes,
  no_zero_fill,
  wrong_selector,
  swapped_nibbles,
  swapped_halves,
  no_swizzle,
};

// y[block] = sum of x[0..n) + block, 128 threads, 4 floats of shared memory.
template <Plant P>
LISSOM_KERNEL(128, 1)
sum(const float* x, float* y, int n) {
  using namespace dev;
  if (P == Plant::return_before_barrier && thread() >= n) return;
  float v = 0;
  if (P == Plant::misaligned_load) v += load(reinterpret_cast<const Vec<float, 2>*>(x + 1))[0];
  for (int i = thread(); i < n; i += threads()) v += load(x + i);
  if (P == Plant::shuffle_in_branch) {
    if (lane() < 16)
      for (int mask = 8; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  } else {
    for (int mask = 16; mask > 0; mask /= 2) v += shuffle_xor(v, mask);
  }
  const Shared<float> parts = shared<float>(0);
  const int first = P == Plant::store_past_end ? 1 : 0;
  const bool skipped = P == Plant::uninitialised_slot && warp() == 2;
  if (lane() == 0 && !skipped) parts.store(first + warp(), v);
  if (P == Plant::barrier_in_branch) {
    if (warp() != 3) barrier();
  } else if (P == Plant::two_barriers) {
    if (warp() == 0)
      barrier();
    else
      barrier();
  } else if (P != Plant::no_barrier) {
    barrier();
  }
  if (thread() == 0) {
    float all = block_x();
    for (int w = 0; w < 4; ++w) all += parts.load(w);
    float* to = y + (P == Plant::same_output ? 0 : block_x());
    store(to, all);
    if (P == Plant::read_only_output) store(to, load(to));
  }
}

// Warp 0 hands x[0..32) to warp 1 through a named barrier: y[i] = x[31 - i] + x[31 - (i ^ 1)], y[32] = number of positive x.
// 64 threads, 65 words of shared memory.
template <Plant P>
LISSOM_KERNEL(64, 1)
relay(const float* x, float* y) {
  using namespace dev;
  const Shared<float> first = shared<float>(0), second = shared<float>(128);
  const Shared<uint32_t> positive = shared<uint32_t>(256);
  if (thread() == 0) positive.store(0, 0);
  barrier();
  if (warp() == 0) {
    const float v = load(x + lane());
    if (P == Plant::late_arrive) barrier_arrive(1, 64);
    first.store(lane(), v);
    if (P == Plant::named_count)
      barrier_arrive(1, 32);
    else if (P == Plant::half_warp && lane() < 16)
      barrier_arrive(2, 64);
    else if (P != Plant::late_arrive)
      barrier_arrive(1, 64);
    if (v > 0) {
      if (P == Plant::plain_count)
        positive.store(0, positive.load(0) + 1);
      else
        atomic_add(positive, 1u);
    }
  } else {
    if (P == Plant::arrive_only)
      barrier_arrive(1, 64);
    else
      barrier_sync(1, 64);
    const float v = first.load(31 - lane());
    second.store(lane(), v);
    if (P != Plant::no_warp_sync) warp_sync();
    store(y + lane(), v + second.load(lane() ^ 1));
  }
  barrier();
  if (thread() == 0) store(y + 32, static_cast<float>(positive.load()));
}

// y[tokens, 32] = x[tokens, k] W[32, k]^T in float, W 2:4. k is a multiple of 16. values [32, k/2]; meta: for each 32 columns 32
// words, word l for lane l. A block takes 16 tokens, 64 threads, a ring of three stages.
constexpr int kRows = 32, kTokens = 16, kStep = 32, kStages = 3;
constexpr int kValueBytes = kRows * kStep, kXBytes = kTokens * kStep * 2, kStageBytes = kValueBytes + kXBytes;
constexpr int kRingBytes = kStages * kStageBytes;

// Byte offset of a 16-byte chunk in a tile whose rows have 2 (values) or 4 (x) of them.
template <Plant P, int Chunks>
LISSOM_DEVICE int chunk_offset(int row, int chunk) {
  const int turn = P == Plant::no_swizzle ? 0 : Chunks == 2 ? row >> 2 & 1 : row >> 1 & 3;
  return (row * Chunks + (chunk ^ turn)) * 16;
}

LISSOM_DEVICE int clamp(int value, int low, int high) {
  return value < low ? low : value > high ? high : value;
}

template <Plant P, class T>
LISSOM_DEVICE void fetch(int step, const T* values, const T* x, int tokens, int k) {
  using namespace dev;
  const int stage = step % kStages * kStageBytes, t = thread();
  {
    const int row = t / 2, chunk = t % 2, column = step * kStep / 2 + 8 * chunk;
    const int bytes = clamp(2 * (k / 2 - column), 0, 16);
    cp_async<16>(shared<T>(stage + chunk_offset<P, 2>(row, chunk)),
                 bytes > 0 ? values + row * (k / 2) + column : values, bytes);
  }
  const int row = t / 4, chunk = t % 4, column = step * kStep + 8 * chunk, token = kTokens * block_x() + row;
  const Shared<T> to = shared<T>(stage + kValueBytes + chunk_offset<P, 4>(row, chunk));
  int bytes = token < tokens ? clamp(2 * (k - column), 0, 16) : 0;
  const T* from = bytes > 0 ? x + int64_t{token} * k + column : x;
  if (P == Plant::source_past_end) from = x + int64_t{token} * k + column, bytes = 16;
  if (P == Plant::shifted_source) from += 1;
  if (P == Plant::too_many_bytes) bytes = 2 * (k - column);
  if (P == Plant::no_zero_fill && bytes == 0) return;
  cp_async<16>(to, from, bytes);
}

template <Plant P, class T>
LISSOM_DEVICE void multiply(int step, uint32_t meta, float (&d)[2][4]) {
  using namespace dev;
  const int stage = step % kStages * kStageBytes, l = lane();
  if (P == Plant::swapped_nibbles) meta = (meta & 0x33333333u) << 2 | (meta >> 2 & 0x33333333u);
  if (P == Plant::swapped_halves) meta = meta << 16 | meta >> 16;
  uint32_t b[4];
  ldmatrix<4>(b, shared<T>(stage + kValueBytes + chunk_offset<P, 4>(8 * warp() + l % 8, l / 8)));
  uint32_t a[2][4];
  for (int m = 0; m < 2; ++m)
    ldmatrix<4>(a[m], shared<T>(stage + chunk_offset<P, 2>(16 * m + l % 16, l / 16)));
  mma_sp_m16n8k32<T, 0>(d[0], a[0], b, meta);
  mma_sp_m16n8k32<T, P == Plant::wrong_selector ? 0 : 1>(d[1], a[1], b, meta);
}

template <Plant P, class T>
LISSOM_KERNEL(64, 1)
ring(const T* values, const uint32_t* meta, const T* x, float* y, int tokens, int k) {
  using namespace dev;
  const int steps = (k + kStep - 1) / kStep;
  for (int s = 0; s < kStages - 1; ++s) {
    if (s < steps) fetch<P>(s, values, x, tokens, k);
    if (P != Plant::no_commit) cp_async_commit();
  }
  float d[2][4] = {};
  for (int step = 0; step < steps; ++step) {
    if (P == Plant::weak_wait)
      cp_async_wait<kStages - 1>();
    else if (P != Plant::no_wait)
      cp_async_wait<kStages - 2>();
    const bool early = P == Plant::load_before_barrier, more = step + kStages - 1 < steps;
    if (early && more) fetch<P>(step + kStages - 1, values, x, tokens, k);
    if (P != Plant::no_loop_barrier) barrier();
    if (!early && more) fetch<P>(step + kStages - 1, values, x, tokens, k);
    if (P != Plant::no_commit) cp_async_commit();
    multiply<P, T>(step, load(meta + 32 * step + lane()), d);
  }
  if (P != Plant::no_reuse_barrier) barrier();
  const Shared<float> tile =
      shared<float>(0);  // [16 tokens][32 rows], padded by 4: columns of d go to different banks
  for (int m = 0; m < 2; ++m)
    for (int r = 0; r < 4; ++r)
      tile.store((8 * warp() + 2 * (lane() % 4) + (r & 1)) * (kRows + 4) + 16 * m + lane() / 4 + 8 * (r >> 1),
                 d[m][r]);
  if (P != Plant::no_read_barrier) barrier();
  for (int i = thread(); i < kTokens * kRows / 4; i += threads()) {
    const int token = i / 8, row = i % 8 * 4;
    if (kTokens * block_x() + token < tokens)
      store(reinterpret_cast<Vec<float, 4>*>(y + (int64_t{kTokens} * block_x() + token) * kRows + row),
            (tile + (token * (kRows + 4) + row)).template as<Vec<float, 4>>().load());
  }
}

}  // namespace lissom::plants
