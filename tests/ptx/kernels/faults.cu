// SPDX-License-Identifier: Apache-2.0
// A ring of asynchronous copies with one fault a number (0: none); test_faults.py names the report that each must cause.
#include "core/cuda/dev.cuh"

namespace lissom {

using namespace dev;

constexpr int kThreads = 128, kStages = 3;

// out[i] = sum over tiles of in[tile][127 - i]: each thread reads what another one copied.
template <int Fault>
LISSOM_KERNEL(kThreads, 1)
ring_check(const float* in, float* out, int tiles) {
  const Shared<float> ring = shared<float>(0);
  const auto copy = [&](int tile) {
    const int from = tile * kThreads + thread() + (Fault == 5 && tile == tiles - 1);
    if (tile < tiles)
      cp_async<4>(ring + tile % kStages * kThreads + thread(),
                  reinterpret_cast<const char*>(in + from) + (Fault == 4 ? 2 : 0));
    cp_async_commit();
  };
  for (int s = 0; s < kStages - 1; ++s) copy(s);
  float sum = 0;
  for (int tile = 0; tile < tiles; ++tile) {
    if (Fault == 3) copy(tile + kStages - 1);
    if (Fault == 2)
      cp_async_wait<kStages - 1>();
    else if (Fault == 3)
      cp_async_wait<kStages - 1>();
    else if (Fault != 10)
      cp_async_wait<kStages - 2>();
    if (Fault == 6) {
      if (thread() < 100) barrier();
    } else if (Fault != 1) {
      barrier();
    }
    if (Fault != 3) copy(tile + kStages - 1);
    sum += (ring + tile % kStages * kThreads).load(kThreads - 1 - thread());
  }
  if (Fault == 7) ring.store(kStages * kThreads + thread(), sum);
  if (Fault == 8) sum += (ring + kStages * kThreads).load(thread());
  if (Fault == 9) {
    if (lane() < 16) sum += shuffle_xor(sum, 1) * 0;
  }
  if (Fault == 11 && warp() == 1) barrier_sync(3, 64);
  if (Fault == 12) {
    ring.store(kStages * kThreads - 1 - lane(), sum);  // every warp its own values, one place
  }
  if (Fault == 13) store(const_cast<float*>(in) + thread(), sum);
  store(out + thread() + (Fault == 14 ? 1 : 0), sum);
  if (Fault == 15) store(out, sum + block_x());  // blocks disagree
}

template __global__ void ring_check<0>(const float*, float*, int);
template __global__ void ring_check<1>(const float*, float*, int);
template __global__ void ring_check<2>(const float*, float*, int);
template __global__ void ring_check<3>(const float*, float*, int);
template __global__ void ring_check<4>(const float*, float*, int);
template __global__ void ring_check<5>(const float*, float*, int);
template __global__ void ring_check<6>(const float*, float*, int);
template __global__ void ring_check<7>(const float*, float*, int);
template __global__ void ring_check<8>(const float*, float*, int);
template __global__ void ring_check<9>(const float*, float*, int);
template __global__ void ring_check<10>(const float*, float*, int);
template __global__ void ring_check<11>(const float*, float*, int);
template __global__ void ring_check<12>(const float*, float*, int);
template __global__ void ring_check<13>(const float*, float*, int);
template __global__ void ring_check<14>(const float*, float*, int);
template __global__ void ring_check<15>(const float*, float*, int);

}  // namespace lissom
