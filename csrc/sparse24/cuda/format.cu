// SPDX-License-Identifier: Apache-2.0
#include "sparse24/cuda/format.cuh"

#include "sparse24/cuda/launch.h"

namespace lissom::sparse24 {
namespace {

// f(element type) for elements of `bytes`.
template <class F>
int by_size(int bytes, const F& f) {
  switch (bytes) {
    case 1: return f(uint8_t{});
    case 2: return f(uint16_t{});
    case 4: return f(uint32_t{});
    default: return kWrongArgument;
  }
}

dev::Grid blocks_of(int64_t rows) { return {(rows + kFormatRows - 1) / kFormatRows}; }

int verdict_of(const BadInRow* rows, int64_t n, int64_t* verdict, void* stream) {
  return dev::launch(verdict_kernel, {1}, kFormatThreads, kVerdictShared, stream, rows, verdict, n);
}

}  // namespace
}  // namespace lissom::sparse24

using namespace lissom::sparse24;

extern "C" {

int lissom_sparse24_check(const void* w, int64_t n, int64_t k, int bytes, void* scratch, int64_t* verdict,
                          void* stream) {
  auto* rows = static_cast<BadInRow*>(scratch);
  const int error = n == 0 ? 0 : by_size(bytes, [&](auto zero) {
    using T = decltype(zero);
    return lissom::dev::launch(check_kernel<T>, blocks_of(n), kFormatThreads, 0, stream,
                               static_cast<const T*>(w), rows, n, k);
  });
  return error ? error : verdict_of(rows, n, verdict, stream);
}

int lissom_sparse24_check_meta(const uint8_t* meta, int64_t n, int64_t k, void* scratch, int64_t* verdict,
                               void* stream) {
  auto* rows = static_cast<BadInRow*>(scratch);
  const int error = n == 0 ? 0
                           : lissom::dev::launch(check_meta_kernel, blocks_of(n), kFormatThreads, 0, stream,
                                                 meta, rows, n, k);
  return error ? error : verdict_of(rows, n, verdict, stream);
}

int lissom_sparse24_compress(const void* w, void* values, uint8_t* meta, int64_t n, int64_t k, int bytes,
                             int keep_largest, void* stream) {
  if (n == 0 || k == 0) return 0;
  return by_size(bytes, [&](auto zero) {
    using T = decltype(zero);
    const auto kernel = keep_largest ? compress_kernel<T, true> : compress_kernel<T, false>;
    return lissom::dev::launch(kernel, blocks_of(n), kFormatThreads, 0, stream, static_cast<const T*>(w),
                               static_cast<T*>(values), meta, n, k);
  });
}

int lissom_sparse24_decompress(const void* values, const uint8_t* meta, void* w, int64_t n, int64_t k,
                               int bytes, void* stream) {
  if (n == 0 || k == 0) return 0;
  return by_size(bytes, [&](auto zero) {
    using T = decltype(zero);
    return lissom::dev::launch(decompress_kernel<T>, blocks_of(n), kFormatThreads, 0, stream,
                               static_cast<const T*>(values), meta, static_cast<T*>(w), n, k);
  });
}

int lissom_sparse24_gather(const void* dense, const uint8_t* meta, void* values, int64_t n, int64_t k,
                           int bytes, void* stream) {
  if (n == 0 || k == 0) return 0;
  return by_size(bytes, [&](auto zero) {
    using T = decltype(zero);
    return lissom::dev::launch(gather_kernel<T>, blocks_of(n), kFormatThreads, 0, stream,
                               static_cast<const T*>(dense), meta, static_cast<T*>(values), n, k);
  });
}
}
