// SPDX-License-Identifier: Apache-2.0
#include "ptx.h"

#include "machine.h"
#include "runtime.h"

using namespace lissom::ptx;

struct PtxModule {
  std::unique_ptr<Module> module;
};

namespace {

std::string g_error;
std::string g_text;  // of the last list that was asked for

template <class F>
int guarded(F f) {
  try {
    f();
    return 0;
  } catch (const std::exception& e) {
    g_error = e.what();
    return 1;
  }
}

}  // namespace

namespace lissom::ptx {

Memory& memory() {
  static Memory& m = *new Memory;
  return m;
}
void set_error(const std::string& text) { g_error = text; }

Options options_of(const PtxOptions& o) {
  return {o.landing, o.seed, o.strict_zero_fill != 0, o.global_shadow != 0, o.approximate != 0, o.max_steps};
}

// What every launch must keep, on any target.
void launch(Module& module, Kernel& k, Dim grid, Dim threads, uint32_t shared_bytes, void* const* args,
            const Options& o) {
  if (!grid.count() || !threads.count()) fault("kernel %s: an empty grid or block", k.name.c_str());
  if (threads.count() > 1024)
    fault("kernel %s: %llu threads in a block", k.name.c_str(),
          static_cast<unsigned long long>(threads.count()));
  if (k.max_threads.x && threads.count() > k.max_threads.count())
    fault("kernel %s: %llu threads, compiled for at most %llu", k.name.c_str(),
          static_cast<unsigned long long>(threads.count()),
          static_cast<unsigned long long>(k.max_threads.count()));
  const Dim r = k.required_threads;
  if (r.x && (threads.x != r.x || threads.y != r.y || threads.z != r.z))
    fault("kernel %s: compiled for blocks of %u x %u x %u", k.name.c_str(), r.x, r.y, r.z);
  Launch l{k, module, memory(), grid, threads, shared_bytes, pack_params(k, args), o};
  run(l);
}

}  // namespace lissom::ptx

PtxOptions ptx_defaults(void) {
  const Options o;
  return {o.landing, o.seed, o.strict_zero_fill, o.global_shadow, o.approximate, o.max_steps};
}

const char* ptx_error(void) { return g_error.c_str(); }

PtxModule* ptx_load(const char* text) {
  auto m = std::make_unique<PtxModule>();
  return guarded([&] { m->module = parse(text); }) ? nullptr : m.release();
}
void ptx_free(PtxModule* m) { delete m; }

const char* ptx_kernels(PtxModule* m) {
  g_text.clear();
  for (const auto& [name, k] : m->module->kernels) g_text += name + "\n";
  return g_text.c_str();
}

const char* ptx_params(PtxModule* m, const char* kernel) {
  g_text.clear();
  const auto it = m->module->kernels.find(kernel);
  if (it != m->module->kernels.end())
    for (const Variable& v : it->second.params) g_text += std::to_string(v.bytes) + "\n";
  return g_text.c_str();
}

const char* ptx_counts(PtxModule* m, const char* kernel) {
  g_text.clear();
  const Kernel* k = nullptr;
  if (!m)
    k = standin_kernel(kernel);
  else if (const auto it = m->module->kernels.find(kernel); it != m->module->kernels.end())
    k = &it->second;
  if (!k) return "";
  for (const Instruction& in : k->code)
    if (in.line)
      g_text +=
          std::to_string(in.executed) + "\t" + std::to_string(in.line) + "\t" + std::string(in.text) + "\n";
  return g_text.c_str();
}

int ptx_buffer(void* base, size_t bytes, int writable, const char* name) {
  return guarded([&] { memory().add(base, bytes, writable != 0, name); });
}
void ptx_forget(const void* base) { memory().remove(base); }
void ptx_forget_all(void) { memory().clear(); }

int ptx_launch(PtxModule* m, const char* kernel, const uint32_t grid[3], const uint32_t threads[3],
               uint32_t shared_bytes, void* const* args, const PtxOptions* o) {
  return guarded([&] {
    const auto it = m->module->kernels.find(kernel);
    if (it == m->module->kernels.end()) fault("no kernel %s", kernel);
    launch(*m->module, it->second, {grid[0], grid[1], grid[2]}, {threads[0], threads[1], threads[2]},
           shared_bytes, args, options_of(*o));
  });
}
