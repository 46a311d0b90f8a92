// SPDX-License-Identifier: Apache-2.0
// Errors that name the op, the argument, what was wanted and what came.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/util/Exception.h>

#include <string>

namespace lissom {

inline std::string shape_of(const at::Tensor& t) {
  std::string s = "[";
  for (int64_t i = 0; i < t.dim(); ++i) s += (i ? ", " : "") + std::to_string(t.size(i));
  return s + "]";
}

}  // namespace lissom

// ValueError / TypeError with the op's name in front.
#define LISSOM_CHECK_VALUE(op, condition, ...) TORCH_CHECK_VALUE(condition, "lissom::" op ": ", __VA_ARGS__)
#define LISSOM_CHECK_TYPE(op, condition, ...) TORCH_CHECK_TYPE(condition, "lissom::" op ": ", __VA_ARGS__)
#define LISSOM_CHECK(op, condition, ...) TORCH_CHECK(condition, "lissom::" op ": ", __VA_ARGS__)
