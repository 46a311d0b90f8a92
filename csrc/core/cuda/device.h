// SPDX-License-Identifier: Apache-2.0
// What the host side asks of the CUDA runtime, without a CUDA header. Every function returns a CUDA error code (0: none);
// a machine without a driver is such an error, not a crash.
#pragma once

namespace lissom::cuda {

struct Device {
  int capability;        // 10 * major + minor
  int sms;               // streaming multiprocessors
  int shared_per_block;  // bytes that a kernel may opt in to
  int shared_per_sm;     // bytes
  int l2_bytes;
};

int device_count(int* count);
int device_facts(int index, Device* facts);

const char* error_text(int code);
int toolkit_version();  // of the compiler that made the kernels: 1000 * major + 10 * minor

}  // namespace lissom::cuda
