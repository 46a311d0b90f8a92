// SPDX-License-Identifier: Apache-2.0
// Stand-in for the CUDA runtime: the entry points that objects compiled by `nvcc -cudart none` import. A launch is checked as
// the driver would check it and goes to the interpreter, with host pointers. No CUDA header is needed; the types below have the
// ABI of theirs. A function that is missing here is an undefined symbol when the launchers are loaded, never a silent success.
#include <cstring>
#include <list>
#include <set>

#include "runtime.h"

using namespace lissom::ptx;

namespace {

enum Error {
  kSuccess = 0,
  kInvalidValue = 1,
  kInvalidConfiguration = 9,
  kInvalidDeviceFunction = 98,
  kInvalidDevice = 101,
  kLaunchOutOfResources = 701,
  kLaunchFailure = 719,
};

struct Device {
  int capability, sms;
  uint32_t shared_optin, shared_sm;  // bytes, of a block and of a multiprocessor
  int l2;
};
constexpr Device kDevices[] = {{80, 108, 163 << 10, 164 << 10, 40 << 20},
                               {90, 132, 227 << 10, 228 << 10, 50 << 20},
                               {100, 148, 227 << 10, 228 << 10, 126 << 20},
                               {120, 188, 99 << 10, 100 << 10, 96 << 20}};
constexpr Device kLeast{80, 108, 99 << 10, 100 << 10, 40 << 20};
constexpr uint32_t kSharedWithoutOptin = 48 << 10;

struct Fatbin {
  const uint8_t* data;
  std::unique_ptr<Module> module;
  std::string failure;
};
struct Function {
  Fatbin* fatbin;
  std::string name;
  uint32_t dynamic_limit = 0;  // by cudaFuncSetAttribute
};
struct Configuration {
  Dim grid, threads;
  size_t shared;
  void* stream;
};
struct Injection {
  int countdown, error;
};

struct State {
  Device device = kLeast;
  Options options;
  std::list<Fatbin> fatbins;
  std::map<const void*, Function> functions;  // by host stub
  std::vector<Configuration> pushed;
  std::map<std::string, Injection> injections;
  std::string launches, text;
  int last_error = kSuccess, sticky = kSuccess;
};
State& state() {
  static State& s = *new State;  // outlives the objects, which unregister at exit
  return s;
}

int fail(int error, const std::string& why) {
  set_error(why);
  return state().last_error = error;
}

// Errors asked for by a test, and the one that a faulted kernel leaves behind for good.
bool refused(const char* function, int* error) {
  State& s = state();
  if (const auto it = s.injections.find(function); it != s.injections.end() && --it->second.countdown == 0) {
    *error = fail(it->second.error, std::string(function) + ": injected error");
    s.injections.erase(it);
    return true;
  }
  *error = s.sticky;
  if (s.sticky) s.last_error = s.sticky;
  return s.sticky != kSuccess;
}

template <class T>
T field(const uint8_t* p, size_t at) {
  T v;
  std::memcpy(&v, p + at, sizeof v);
  return v;
}

// The PTX for the newest architecture that the device still runs. A fat binary is a header of (magic, version, header bytes,
// u64 bytes behind it) and entries of (u16 kind, -, u32 header bytes, u64 bytes, ..., u32 architecture at 28, u64 flags at 40).
std::string ptx_of(const uint8_t* data) {
  constexpr uint32_t kMagic = 0xba55ed50;
  constexpr uint64_t kCompressed = 0x2000 | 0x8000;
  if (field<uint32_t>(data, 0) != kMagic) fault("this is no fat binary");
  const uint8_t* entry = data + field<uint16_t>(data, 6);
  const uint8_t* end = entry + field<uint64_t>(data, 8);
  uint32_t best = 0;
  std::string text;
  while (entry < end) {
    const uint32_t header = field<uint32_t>(entry, 4), arch = field<uint32_t>(entry, 28);
    const uint64_t bytes = field<uint64_t>(entry, 8);
    if (field<uint16_t>(entry, 0) == 1 && arch >= best &&
        arch <= static_cast<uint32_t>(state().device.capability)) {
      if (field<uint64_t>(entry, 40) & kCompressed)
        fault("the PTX is compressed: compile with nvcc --no-compress");
      const auto* from = reinterpret_cast<const char*>(entry + header);
      text.assign(from, strnlen(from, bytes));
      best = arch;
    }
    entry += header + bytes;
  }
  if (text.empty())
    fault("no PTX for compute_%d in this object: compile with -gencode arch=compute_80,code=compute_80",
          state().device.capability);
  return text;
}

Kernel* kernel_of(Function& f) {
  Fatbin& fat = *f.fatbin;
  if (!fat.module && fat.failure.empty()) {
    try {
      fat.module = parse(ptx_of(fat.data));
    } catch (const std::exception& e) {
      fat.failure = e.what();
    }
  }
  if (!fat.failure.empty()) {
    set_error(fat.failure);
    return nullptr;
  }
  const auto it = fat.module->kernels.find(f.name);
  if (it == fat.module->kernels.end()) set_error("no kernel " + f.name);
  return it == fat.module->kernels.end() ? nullptr : &it->second;
}

Function* function_of(const void* host) {
  const auto it = state().functions.find(host);
  return it == state().functions.end() ? nullptr : &it->second;
}

int launch_kernel(const char* entry, const void* host, Dim grid, Dim threads, void** args, size_t shared,
                  void* stream) {
  State& s = state();
  int error;
  if (refused(entry, &error)) return error;
  Function* f = function_of(host);
  Kernel* k = f ? kernel_of(*f) : nullptr;
  if (!f) return fail(kInvalidDeviceFunction, "launch of something that is no registered kernel");
  if (!k) return s.last_error = kInvalidDeviceFunction;
  const auto refuse = [&](int code, const std::string& why) {
    return fail(code, "launch of " + f->name + ": " + why);
  };
  if (!grid.count() || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535)
    return refuse(kInvalidConfiguration, "grid of " + std::to_string(grid.x) + " x " +
                                             std::to_string(grid.y) + " x " + std::to_string(grid.z));
  if (!threads.count() || threads.x > 1024 || threads.y > 1024 || threads.z > 64 || threads.count() > 1024)
    return refuse(kInvalidConfiguration, std::to_string(threads.count()) + " threads");
  if (k->max_threads.x && threads.count() > k->max_threads.count())
    return refuse(kLaunchOutOfResources, "more threads than its launch bounds");
  const uint64_t total = k->static_shared + shared;
  if (total > s.device.shared_optin)
    return refuse(kInvalidValue, std::to_string(total) + " bytes of shared memory");
  if (total > kSharedWithoutOptin && shared > f->dynamic_limit)
    return refuse(kInvalidValue, std::to_string(shared) +
                                     " bytes of dynamic shared memory without opt-in (cudaFuncSetAttribute)");
  char line[256];
  snprintf(line, sizeof line, "\t%u,%u,%u\t%u,%u,%u\t%zu\t%p\n", grid.x, grid.y, grid.z, threads.x, threads.y,
           threads.z, shared, stream);
  s.launches += f->name + line;
  try {
    launch(*f->fatbin->module, *k, grid, threads, static_cast<uint32_t>(shared), args, s.options);
  } catch (const std::exception& e) {
    s.sticky = kLaunchFailure;
    return fail(kLaunchFailure, e.what());
  }
  return kSuccess;
}

}  // namespace

extern "C" {

// --- C interface of the stand-in ---

void ptx_set_options(const PtxOptions* o) { state().options = options_of(*o); }
int ptx_set_device(int capability) {
  for (const Device& d : kDevices)
    if (d.capability == capability) return state().device = d, 0;
  set_error("no such device");
  return 1;
}
void ptx_inject(const char* function, int nth, int error) { state().injections[function] = {nth, error}; }
const char* ptx_launches(void) { return state().launches.c_str(); }
void ptx_reset(void) {
  State& s = state();
  s.launches.clear();
  s.injections.clear();
  s.pushed.clear();
  s.last_error = s.sticky = kSuccess;
  s.device = kLeast;
  s.options = Options{};
  for (auto& [host, f] : s.functions) f.dynamic_limit = 0;
  set_error("");
}

// --- registration, called by the static constructors of an object ---

struct Dim3 {
  uint32_t x, y, z;
};
void** __cudaRegisterFatBinary(void* wrapper) {
  auto& list = state().fatbins;
  list.push_back({field<const uint8_t*>(static_cast<const uint8_t*>(wrapper), 8), nullptr, ""});
  return reinterpret_cast<void**>(&list.back());
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void** handle) {
  State& s = state();
  auto* gone = reinterpret_cast<Fatbin*>(handle);
  std::erase_if(s.functions, [&](const auto& f) { return f.second.fatbin == gone; });
  s.fatbins.remove_if([&](const Fatbin& f) { return &f == gone; });
}
void __cudaRegisterFunction(void** handle, const char* host, char*, const char* name, int, void*, void*,
                            void*, void*, int*) {
  state().functions[host] = {reinterpret_cast<Fatbin*>(handle), name};
}
void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}

// --- launches ---

unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 threads, size_t shared, void* stream) {
  state().pushed.push_back({{grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z}, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* threads, size_t* shared, void* stream) {
  auto& pushed = state().pushed;
  if (pushed.empty()) return fail(kInvalidConfiguration, "a launch without configuration");
  const Configuration c = pushed.back();
  pushed.pop_back();
  *grid = {c.grid.x, c.grid.y, c.grid.z};
  *threads = {c.threads.x, c.threads.y, c.threads.z};
  *shared = c.shared;
  std::memcpy(stream, &c.stream, sizeof(void*));
  return kSuccess;
}
int __cudaGetKernel(const void** kernel, const void* host) {
  *kernel = host;
  return function_of(host) ? kSuccess : fail(kInvalidDeviceFunction, "no registered kernel");
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 threads, void** args, size_t shared,
                       void* stream) {
  return launch_kernel("cudaLaunchKernel", kernel, {grid.x, grid.y, grid.z},
                       {threads.x, threads.y, threads.z}, args, shared, stream);
}
int cudaLaunchKernel(const void* host, Dim3 grid, Dim3 threads, void** args, size_t shared, void* stream) {
  return launch_kernel("cudaLaunchKernel", host, {grid.x, grid.y, grid.z}, {threads.x, threads.y, threads.z},
                       args, shared, stream);
}

int cudaFuncSetAttribute(const void* host, int attribute, int value) {
  int error;
  if (refused("cudaFuncSetAttribute", &error)) return error;
  constexpr int kMaxDynamicShared = 8, kCarveout = 9;
  Function* f = function_of(host);
  const Kernel* k = f ? kernel_of(*f) : nullptr;
  if (!k) return state().last_error = kInvalidDeviceFunction;
  if (attribute == kCarveout && value >= -1 && value <= 100) return kSuccess;
  if (attribute != kMaxDynamicShared || value < 0 || value + k->static_shared > state().device.shared_optin)
    return fail(kInvalidValue, "cudaFuncSetAttribute of " + f->name + ": attribute " +
                                   std::to_string(attribute) + ", value " + std::to_string(value));
  f->dynamic_limit = static_cast<uint32_t>(value);
  return kSuccess;
}

// --- device and errors ---

int cudaGetDeviceCount(int* count) {
  int error;
  *count = 1;
  return refused("cudaGetDeviceCount", &error) ? error : kSuccess;
}
int cudaGetDevice(int* device) {
  int error;
  *device = 0;
  return refused("cudaGetDevice", &error) ? error : kSuccess;
}
int cudaSetDevice(int device) {
  int error;
  if (refused("cudaSetDevice", &error)) return error;
  return device == 0 ? kSuccess : fail(kInvalidDevice, "there is one device");
}
int cudaDeviceGetAttribute(int* value, int attribute, int device) {
  int error;
  if (refused("cudaDeviceGetAttribute", &error)) return error;
  if (device != 0) return fail(kInvalidDevice, "there is one device");
  const Device& d = state().device;
  const std::map<int, int64_t> known = {{1, 1024},
                                        {8, kSharedWithoutOptin},
                                        {10, kLanes},
                                        {16, d.sms},
                                        {38, d.l2},
                                        {39, d.capability == 120 ? 1536 : 2048},
                                        {75, d.capability / 10},
                                        {76, d.capability % 10},
                                        {81, d.shared_sm},
                                        {82, 65536},
                                        {97, d.shared_optin}};
  const auto it = known.find(attribute);
  if (it == known.end()) return fail(kInvalidValue, "unknown device attribute " + std::to_string(attribute));
  *value = static_cast<int>(it->second);
  return kSuccess;
}
int cudaGetLastError(void) {
  State& s = state();
  const int error = s.last_error;
  s.last_error = s.sticky;
  return error;
}
int cudaPeekAtLastError(void) { return state().last_error; }
const char* cudaGetErrorString(int error) {
  State& s = state();
  s.text = error == kSuccess ? "no error" : "error " + std::to_string(error);
  return s.text.c_str();
}
const char* cudaGetErrorName(int error) { return cudaGetErrorString(error); }
int cudaDeviceSynchronize(void) { return state().sticky; }
int cudaStreamSynchronize(void*) { return state().sticky; }
int cudaMemsetAsync(void* to, int value, size_t bytes, void*) {
  int error;
  if (refused("cudaMemsetAsync", &error)) return error;
  try {
    if (!memory().find(reinterpret_cast<uint64_t>(to), bytes).writable)
      return fail(kInvalidValue, "memset of a read-only buffer");
  } catch (const std::exception& e) {
    return fail(kInvalidValue, e.what());
  }
  std::memset(to, value, bytes);
  return kSuccess;
}

}  // extern "C"

namespace lissom::ptx {

Kernel* standin_kernel(const std::string& name) {
  for (Fatbin& f : state().fatbins)
    if (f.module)
      if (const auto it = f.module->kernels.find(name); it != f.module->kernels.end()) return &it->second;
  return nullptr;
}

}  // namespace lissom::ptx
