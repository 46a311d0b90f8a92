// SPDX-License-Identifier: Apache-2.0
#include "sparse24/cuda/pack.cuh"

#include "sparse24/cuda/launch.h"

using namespace lissom;
using namespace lissom::sparse24;

namespace {

template <int Bytes>
int pack(const void* values, const uint8_t* meta, unsigned char* packed, const PackedHeader& header,
         void* stream) {
  const int64_t records = sm80::panels(header.n) * sm80::records(header.k, Bytes);
  const int64_t blocks = records ? (records + kPackWarps - 1) / kPackWarps : 1;  // one writes the header
  const CanonicalView<Bytes> w = {static_cast<const typename CanonicalView<Bytes>::Kept*>(values), meta,
                                  header.n, header.k};
  return dev::launch(pack_kernel<Bytes>, {blocks}, kPackThreads, 0, stream, w, packed, header);
}

template <int Bytes>
int unpack(const unsigned char* packed, void* values, uint8_t* meta, int64_t n, int64_t k, void* stream) {
  return dev::launch(unpack_kernel<Bytes>, {(n + kPackWarps - 1) / kPackWarps}, kPackThreads, 0, stream,
                     packed, static_cast<typename CanonicalView<Bytes>::Kept*>(values), meta, n, k);
}

}  // namespace

extern "C" {

int lissom_sparse24_pack(const void* values, const uint8_t* meta, void* packed, int64_t n, int64_t k,
                         int dtype, void* stream) {
  const PackedHeader header = sm80::header(n, k, dtype);
  auto* const out = static_cast<unsigned char*>(packed);
  switch (sm80::element_bytes(dtype)) {
    case 1: return pack<1>(values, meta, out, header, stream);
    case 2: return pack<2>(values, meta, out, header, stream);
    default: return kWrongArgument;
  }
}

int lissom_sparse24_unpack(const void* packed, void* values, uint8_t* meta, int64_t n, int64_t k, int dtype,
                           void* stream) {
  const auto* const in = static_cast<const unsigned char*>(packed);
  if (n == 0 || k == 0) return 0;
  switch (sm80::element_bytes(dtype)) {
    case 1: return unpack<1>(in, values, meta, n, k, stream);
    case 2: return unpack<2>(in, values, meta, n, k, stream);
    default: return kWrongArgument;
  }
}
}
