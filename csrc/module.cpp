// SPDX-License-Identifier: Apache-2.0
// The Python module itself: everything about tensors goes through the dispatcher, only the plain questions live here.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <string>

#include "core/cpu_isa.h"
#include "sparse24/sparse24.h"

namespace py = pybind11;

namespace lissom {
namespace {

py::dict build_info() {
  py::dict d;
  d["torch"] = TORCH_VERSION;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["cxx"] = static_cast<long>(__cplusplus);
  d["cuda"] = false;
  return d;
}

// sparse24 path by type and number of tokens, as the kernels would choose it now.
py::dict path_table() {
  py::dict table;
  const char* names[] = {"float32", "bfloat16", "float16"};
  for (int t = 0; t < 3; ++t) {
    py::dict row;
    for (int64_t m : {1, 4, 16, 64, 256, 1024})
      row[py::int_(m)] = sparse24::choose_path(cpu_isa(), static_cast<DType>(t), m).name;
    table[names[t]] = row;
  }
  return table;
}

py::dict cpu_info() {
  py::dict d;
  d["model"] = cpu_model_name();
  d["detected_isa"] = isa_name(detected_isa());
  d["isa"] = isa_name(cpu_isa());
  d["core"] = core_plan().core;
  d["core_measured"] = core_plan().measured;
  d["sparse24"] = path_table();
  return d;
}

void choose_isa(const std::string& name) {
  CpuIsa isa;
  if (!isa_from_name(name.c_str(), &isa))
    throw py::value_error("lissom.set_cpu_isa: wanted one of portable, avx2, avx512, avx512x, amx; got '" +
                          name + "'");
  if (!set_cpu_isa(isa))
    throw py::value_error("lissom.set_cpu_isa: this CPU has tiers up to '" +
                          std::string(isa_name(detected_isa())) + "'; got '" + name + "'");
}

DType type_from_name(const std::string& name) {
  if (name == "float32") return DType::f32;
  if (name == "bfloat16") return DType::bf16;
  if (name == "float16") return DType::f16;
  throw py::value_error("lissom: wanted float32, bfloat16 or float16; got '" + name + "'");
}

std::string path_name(const std::string& dtype, int64_t m) {
  return sparse24::choose_path(cpu_isa(), type_from_name(dtype), m).name;
}

// For tests and `lissom bench tune` only: every path must be right on every core, not just the one that the table picks.
void force_path(const std::string& name) {
  if (!sparse24::force_path(name.c_str()))
    throw py::value_error("lissom._C.force_path: no path is called '" + name + "'");
}

}  // namespace
}  // namespace lissom

PYBIND11_MODULE(_C, m) {
  m.def("build_info", &lissom::build_info);
  m.def("cpu_info", &lissom::cpu_info);
  m.def("cpu_isa", [] { return lissom::isa_name(lissom::cpu_isa()); });
  m.def("set_cpu_isa", &lissom::choose_isa);
  m.def("path_name", &lissom::path_name);
  m.def("force_path", &lissom::force_path);
}
