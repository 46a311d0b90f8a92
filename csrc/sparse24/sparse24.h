// SPDX-License-Identifier: Apache-2.0
// What the host side may call: raw pointers, sizes and strides in elements. Torch-free.
#pragma once

#include <stddef.h>

#include "core/cpu_isa.h"
#include "sparse24/layout.h"

namespace lissom::sparse24 {

enum class Act : int32_t { none, relu, gelu, gelu_tanh, silu };

// y = act(x W^T + bias) + residual; int8: y = act(scale_x[m] scale_w[n] (x W^T) + bias) + residual, sums in int32
struct Linear {
  int64_t m, n, k;
  const void* x;  // [m, k], row stride ldx
  int64_t ldx;
  const uint8_t* records;  // packed W behind its header
  const float* bias;       // [16 * panels(n)] or null
  const float* scale_w;    // int8: [16 * panels(n)]
  const float* scale_x;    // int8: [m]
  const void* residual;    // [m, n] in the output type, row stride ldr, or null
  int64_t ldr;
  void* y;  // [m, n], row stride n
  DType dtype;
  DType out;
  Act act;
};

// One way to compute a Linear. The host packs x once (all tiles), then runs ranges of panels, both split over threads.
struct Path {
  const char* name;
  int64_t (*x_tiles)(const Linear&);
  size_t (*x_bytes)(const Linear&);
  // False: x holds Inf or NaN and this path would multiply them by pruned zeros; take another one.
  bool (*pack_x)(const Linear&, int64_t tile_begin, int64_t tile_end, void* packed_x);
  size_t (*scratch_bytes)(const Linear&);  // of one thread
  void (*run)(const Linear&, const void* packed_x, int64_t panel_begin, int64_t panel_end, void* scratch);
};

// Symmetric int8 of rows, as lissom.ops.quantize_rows defines it.
struct Rows {
  int64_t m, k;
  const void* x;  // [m, k], row stride ldx
  int64_t ldx;
  DType dtype;
  int8_t* q;     // [m, k]
  float* scale;  // [m]
};

// Null where a tier has no such path for the type.
struct Kernels {
  const Path* permuted[kTypeCount];  // activations permuted to the kept values; indexed by DType
  const Path* lanes[kTypeCount];     // lanes over tokens
  const Path* dot[kTypeCount];       // permuted, with a dot instruction: bf16, int8
  const Path* tiles[kTypeCount];     // records expanded into AMX tiles: bf16, int8
  void (*quantize)(const Rows&, int64_t begin, int64_t end);
};
const Kernels& kernels(CpuIsa isa);

// The fastest path of this tier on this core (see the table in core/cpu_isa.cpp). Not all `finite`: the fastest on which a
// pruned position never sees x.
const Path& choose_path(CpuIsa isa, DType dtype, int64_t m, bool finite = true);

// Overrules choose_path wherever the tier has the named path for the type: "permuted", "lanes", "permuted-dot", "tiles";
// "" gives the choice back. False for another name. For tests and tuning.
bool force_path(const char* name);

// Format work, any CPU. Rows [begin, end) of W; element type by size (bit patterns are only moved and compared to zero).
struct Canonical {
  int64_t n, k;
  void* values;   // [n, k/2] contiguous
  uint8_t* meta;  // [n, meta_columns(k)] contiguous
  int64_t bytes;  // of one element: 1 (int8), 2 or 4
};
struct BadQuad {
  int64_t row, quad;  // row < 0: none
  int found;          // non-zeros of the quad, or the illegal nibble
};
BadQuad check_rows(const void* w, int64_t k, int64_t bytes, int64_t begin, int64_t end);
BadQuad check_meta_rows(const uint8_t* meta, int64_t k, int64_t begin, int64_t end);
// keep_largest: quads with more than two non-zeros keep the two of largest magnitude (ties: the lower position).
void compress_rows(const void* w, const Canonical& out, bool keep_largest, int64_t begin, int64_t end);
void decompress_rows(const Canonical& in, void* w, int64_t begin, int64_t end);
// dvalues[n, kept] = dense[n - first, column of kept]; `dense` holds rows from `first`.
void gather_rows(const void* dense, const Canonical& out, int64_t first, int64_t begin, int64_t end);
void pack_panels(const Canonical& in, DType dtype, uint8_t* records_out, int64_t begin, int64_t end);
void unpack_panels(const uint8_t* records_in, DType dtype, const Canonical& out, int64_t begin, int64_t end);
// Panels of sm80-v1, of 1 or 2 bytes an element; `packed` begins with its header, which is left alone.
void pack_sm80(const Canonical& in, uint8_t* packed, int64_t begin, int64_t end);
void unpack_sm80(const uint8_t* packed, const Canonical& out, int64_t begin, int64_t end);

}  // namespace lissom::sparse24
