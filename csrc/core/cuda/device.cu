// SPDX-License-Identifier: Apache-2.0
#include "core/cuda/device.h"

#include <cuda_runtime_api.h>

namespace lissom::cuda {

// The runtime remembers its last error until it is asked for: left there, it would be taken for one of the next launch.
int device_count(int* count) {
  const cudaError_t error = cudaGetDeviceCount(count);
  if (error != cudaSuccess) {
    *count = 0;
    cudaGetLastError();
  }
  return error;
}

int device_facts(int index, Device* facts) {
  int major = 0, minor = 0;
  const struct {
    int* value;
    cudaDeviceAttr name;
  } wanted[] = {
      {&major, cudaDevAttrComputeCapabilityMajor},
      {&minor, cudaDevAttrComputeCapabilityMinor},
      {&facts->sms, cudaDevAttrMultiProcessorCount},
      {&facts->shared_per_block, cudaDevAttrMaxSharedMemoryPerBlockOptin},
      {&facts->shared_per_sm, cudaDevAttrMaxSharedMemoryPerMultiprocessor},
      {&facts->l2_bytes, cudaDevAttrL2CacheSize},
  };
  for (const auto& attribute : wanted) {
    const cudaError_t error = cudaDeviceGetAttribute(attribute.value, attribute.name, index);
    if (error != cudaSuccess) {
      cudaGetLastError();
      return error;
    }
  }
  facts->capability = 10 * major + minor;
  return cudaSuccess;
}

const char* error_text(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }

int toolkit_version() { return CUDART_VERSION; }

}  // namespace lissom::cuda
