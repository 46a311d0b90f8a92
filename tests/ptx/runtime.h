// SPDX-License-Identifier: Apache-2.0
// What the C interface and the stand-in for the CUDA runtime share.
#pragma once

#include "machine.h"
#include "ptx.h"

namespace lissom::ptx {

Memory& memory();
void set_error(const std::string& text);
Options options_of(const PtxOptions&);
void launch(Module&, Kernel&, Dim grid, Dim threads, uint32_t shared_bytes, void* const* args,
            const Options&);
Kernel* standin_kernel(const std::string& name);  // of the objects registered with the stand-in

}  // namespace lissom::ptx
