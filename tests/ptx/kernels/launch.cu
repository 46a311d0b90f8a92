// SPDX-License-Identifier: Apache-2.0
// Launchers for the tests of the stand-in: by dev::launch and by the three angle brackets.
#include "core/cuda/dev.cuh"

namespace lissom {

using namespace dev;

__device__ int counted = 5;

LISSOM_KERNEL(128, 1) scale(const float* x, float* y, int n, double by, int8_t add) {
  const Shared<float> s = shared<float>(0);
  const int i = block_x() * threads() + thread();
  s.store(thread(), i < n ? load(x + i) : 0.0f);
  barrier();
  if (i < n) store(y + i, static_cast<float>(s.load(thread()) * by) + add);
}

__global__ void bump(int* y) { y[threadIdx.x] = counted + static_cast<int>(blockIdx.z); }

}  // namespace lissom

extern "C" {

int launch_scale(const float* x, float* y, int n, double by, int shared_bytes, int64_t grid, void* stream) {
  return lissom::dev::launch(lissom::scale, {grid}, 128, shared_bytes, stream, x, y, n, by, 1);
}
int launch_without_opt_in(const float* x, float* y, int n, int shared_bytes, int threads) {
  lissom::scale<<<2, threads, shared_bytes>>>(x, y, n, 2.0, 0);
  return cudaGetLastError();
}
int launch_bump(int* y, int grid_z) {
  lissom::bump<<<dim3(1, 1, grid_z), 4>>>(y);
  return cudaGetLastError();
}
int query(int* sms, int* optin) {
  const cudaError_t error = cudaDeviceGetAttribute(sms, cudaDevAttrMultiProcessorCount, 0);
  return error ? error : cudaDeviceGetAttribute(optin, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
}
}
