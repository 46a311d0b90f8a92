// SPDX-License-Identifier: Apache-2.0
// The Python module itself: everything about tensors goes through the dispatcher, only the plain questions live here.
#include <pybind11/pybind11.h>
#include <torch/version.h>

#include <algorithm>
#include <string>

#include "core/cpu_isa.h"
#include "sparse24/cuda/plan.h"
#include "sparse24/sparse24.h"
#ifdef LISSOM_CUDA_ARCHITECTURES
#include "core/cuda/device.h"
#endif

namespace py = pybind11;

namespace lissom {
namespace {

// "13.0", or None in a build without CUDA kernels.
py::object cuda_toolkit() {
#ifdef LISSOM_CUDA_ARCHITECTURES
  const int version = cuda::toolkit_version();
  return py::str(std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10));
#else
  return py::none();
#endif
}

py::dict build_info() {
  py::dict d;
  d["torch"] = TORCH_VERSION;
#if defined(__clang__)
  d["compiler"] = "clang " __clang_version__;
#else
  d["compiler"] = "gcc " __VERSION__;
#endif
  d["cxx"] = static_cast<long>(__cplusplus);
  d["cuda"] = cuda_toolkit();
  return d;
}

// What the CUDA kernels were compiled for and what is here to run them. Opens the driver: not for import time.
py::dict cuda_info() {
  py::dict d;
  int devices = 0;
  py::object trouble = py::none();
#ifdef LISSOM_CUDA_ARCHITECTURES
  d["architectures"] = py::str(LISSOM_CUDA_ARCHITECTURES).attr("split")(",");
  if (const int error = cuda::device_count(&devices)) trouble = py::str(cuda::error_text(error));
#else
  d["architectures"] = py::list();
  trouble = py::str("this build has no CUDA kernels");
#endif
  d["toolkit"] = cuda_toolkit();
  d["devices"] = devices;
  d["trouble"] = trouble;
  return d;
}

std::string minor_version(const std::string& version) {
  return version.substr(0, version.find('.', version.find('.') + 1));
}

// c10's C++ interface changes from one minor version to the next, and not every change fails to load.
void require_torch_of_the_build() {
  const std::string running = py::str(py::module_::import("torch").attr("__version__"));
  if (minor_version(running) != minor_version(TORCH_VERSION))
    throw py::import_error("lissom was built with torch " TORCH_VERSION ", and this is torch " + running +
                           "; install lissom again in this environment, so that it is built with its torch");
}

// sparse24 path by type and number of tokens, as the kernels would choose it now.
py::dict path_table() {
  py::dict table;
  const char* names[kTypeCount] = {"float32", "bfloat16", "float16", "int8"};
  for (int t = 0; t < kTypeCount; ++t) {
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
  if (name == "int8") return DType::i8;
  throw py::value_error("lissom: wanted float32, bfloat16, float16 or int8; got '" + name + "'");
}

std::string path_name(const std::string& dtype, int64_t m) {
  return sparse24::choose_path(cpu_isa(), type_from_name(dtype), m).name;
}

// For tests and `lissom bench tune` only: every path must be right on every core, not just the one that the table picks.
void force_path(const std::string& name) {
  if (!sparse24::force_path(name.c_str()))
    throw py::value_error("lissom._C.force_path: no path is called '" + name + "'");
}

// "a100" ..., or "cuda:0": the device there.
sparse24::Gpu gpu_from_name(const std::string& name) {
  for (const auto& known : sparse24::kGpus)
    if (name == known.name) return *known.gpu;
#ifdef LISSOM_CUDA_ARCHITECTURES
  if (name.rfind("cuda:", 0) == 0) {
    cuda::Device d;
    if (const int error = cuda::device_facts(std::stoi(name.substr(5)), &d))
      throw std::runtime_error("lissom: no facts of " + name + ": " + cuda::error_text(error));
    return sparse24::gpu_of(d.capability, d.sms, d.shared_per_block, d.shared_per_sm);
  }
#endif
  std::string names;
  for (const auto& known : sparse24::kGpus) names += (names.empty() ? "" : ", ") + std::string(known.name);
  throw py::value_error("lissom: wanted one of " + names + "; got '" + name + "'");
}

// What the model of the CUDA kernels says of y [m, n] = x W^T: counts, and seconds by arithmetic alone.
py::dict sparse24_predict(const std::string& gpu, int64_t m, int64_t n, int64_t k, int bytes) {
  if (m < 1 || n < 1 || k < 4 || k % 4 != 0 || (bytes != 1 && bytes != 2) || std::max({m, n, k}) >> 30 != 0)
    throw py::value_error(
        "lissom: wanted m, n >= 1, k a multiple of 4 from 4 on, all below 2^30, and 1 or 2 bytes");
  const sparse24::Gpu g = gpu_from_name(gpu);
  const sparse24::Size s = {m, n, k, bytes};
  const sparse24::Plan plan = sparse24::choose_plan(s, g);
  const sparse24::Prediction p = sparse24::predict(s, plan, g);
  const sparse24::Counts c = sparse24::count(s, plan, g);
  const double dense =
      std::max(2.0 * (1.0 * m * k + 1.0 * n * k + 1.0 * m * n) / g.memory, 2.0 * m * n * k / g.dense);
  py::dict d;
  d["tile"] = plan.tile < 0
                  ? py::object(py::none())
                  : py::make_tuple(sparse24::kTiles[plan.tile].rows, sparse24::kTiles[plan.tile].tokens);
  d["splits"] = plan.splits;
  d["blocks"] = c.blocks;
  d["waves"] = c.waves;
  d["bytes_moved"] = p.bytes;
  d["matrix_instructions"] = c.matrix;
  d["wavefronts"] = c.wavefronts;
  d["seconds"] = p.total;
  d["launch_seconds"] = g.launch;
  d["memory_seconds"] = p.memory;
  d["l2_seconds"] = p.l2;
  d["sm_seconds"] = p.sm;
  d["bound_seconds"] = sparse24::bound(s, g);
  d["bound_is_memory"] = sparse24::least_bytes(s) / g.memory >= sparse24::bound(s, g);
  d["dense_bf16_bound_seconds"] = dense;
  return d;
}

}  // namespace
}  // namespace lissom

PYBIND11_MODULE(_C, m) {
  lissom::require_torch_of_the_build();
  m.def("build_info", &lissom::build_info);
  m.def("cpu_info", &lissom::cpu_info);
  m.def("cuda_info", &lissom::cuda_info);
  m.def("cpu_isa", [] { return lissom::isa_name(lissom::cpu_isa()); });
  m.def("set_cpu_isa", &lissom::choose_isa);
  m.def("path_name", &lissom::path_name);
  m.def("force_path", &lissom::force_path);
  m.def("sparse24_predict", &lissom::sparse24_predict);
}
