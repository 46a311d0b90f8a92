// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/from_blob.h>

#include <cstdint>

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace lissom {

constexpr int64_t kHugePage = int64_t{2} << 20;

// Uninitialised bytes of a weight that is written once and streamed at every call. Hardware prefetchers stop at the end of
// a page, so whole huge pages are asked for, aligned to one; the rest at the end, and anything smaller, takes 4 KiB pages.
// torch's allocator serves where the system has no such pages, or no room left for a mapping.
inline at::Tensor empty_streamed(int64_t bytes, const at::TensorOptions& options) {
#if defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 4096;
  const int64_t length = (bytes + kPage - 1) / kPage * kPage;
  void* whole = MAP_FAILED;
  if (bytes >= kHugePage)
    whole = mmap(nullptr, static_cast<size_t>(length + kHugePage), PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (whole != MAP_FAILED) {
    char* const first = static_cast<char*>(whole);
    const int64_t ahead = -reinterpret_cast<intptr_t>(first) & (kHugePage - 1);
    char* const begin = first + ahead;
    if (ahead) munmap(first, static_cast<size_t>(ahead));
    if (ahead < kHugePage) munmap(begin + length, static_cast<size_t>(kHugePage - ahead));
    madvise(begin, static_cast<size_t>(bytes / kHugePage * kHugePage), MADV_HUGEPAGE);
    return at::from_blob(
        begin, {bytes}, [length](void* p) { munmap(p, static_cast<size_t>(length)); }, options);
  }
#endif
  return at::empty({bytes}, options);
}

}  // namespace lissom
