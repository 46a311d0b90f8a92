// SPDX-License-Identifier: Apache-2.0
// Scheduling, barriers, collectives, launch.
#include "executor.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>
#include <numeric>

#include "block.h"

#if !defined(SIMT_UCONTEXT)
asm(R"(
.text
.globl simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, .-simt_switch
)");
#endif

namespace simt {
namespace {

Block* the_block = nullptr;
std::vector<Run*>& runs() {
  static std::vector<Run*> all;
  return all;
}
Fiber& fiber(int thread) {
  static std::vector<std::unique_ptr<Fiber>> all;
  while (static_cast<int>(all.size()) <= thread) all.push_back(std::make_unique<Fiber>());
  return *all[thread];
}

bool same(const char* a, const char* b) { return a == b || strcmp(a, b) == 0; }
bool same(const Site& a, const Site& b) { return a.line() == b.line() && same(a.file_name(), b.file_name()); }
std::string text(const Site& at) { return std::string(at.file_name()) + ":" + std::to_string(at.line()); }

const char* advice(Kind kind) {
  switch (kind) {
    case Kind::race: return "put a barrier (inside one warp: warp_sync) between the two accesses";
    case Kind::in_flight: return "wait for the group of that copy, then a barrier, before touching its bytes";
    case Kind::uninitialised:
      return "store, copy or zero-fill these bytes first; the reader may also have run ahead for want of a "
             "barrier";
    case Kind::bounds: return "check the offset, the size given to the launch, and the guards at the edges";
    case Kind::misaligned: return "an access of n bytes needs an address that is a multiple of n";
    case Kind::divergence: return "let all of them reach the same line: move it out of the branch";
    case Kind::deadlock:
      return "no early return before a barrier; no barrier in a branch; counts of named barriers";
    case Kind::read_only: return "use load_plain for data that this launch writes, or a second launch";
    case Kind::operand: return "see the rule in dev.cuh";
    case Kind::launch: return "choose another launch configuration";
  }
  return "";
}

// The kernel's name; needs -rdynamic and external linkage.
std::string name_of(const void* kernel) {
  Dl_info info{};
  if (dladdr(kernel, &info) == 0 || info.dli_sname == nullptr || info.dli_saddr != kernel) return "kernel";
  int status = 0;
  char* readable = abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status);
  std::string name = status == 0 ? readable : info.dli_sname;
  free(readable);
  if (name.starts_with("void ")) name.erase(0, 5);
  size_t at = name.size();  // cut the parameters: back to the bracket that the last one closes
  for (int depth = 0; at > 0 && name.back() == ')';) {
    depth += name[--at] == ')' ? 1 : name[at] == '(' ? -1 : 0;
    if (depth == 0) break;
  }
  return name.substr(0, at);
}

std::string ranges(const std::vector<int>& threads) {
  std::string out;
  for (size_t i = 0; i < threads.size();) {
    size_t end = i;
    while (end + 1 < threads.size() && threads[end + 1] == threads[end] + 1) ++end;
    out += (out.empty() ? "" : ", ") + std::to_string(threads[i]);
    if (end > i) out += "-" + std::to_string(threads[end]);
    i = end + 1;
  }
  return out;
}

void record(Run& run, Kind kind, unsigned line, const std::string& what) {
  run.fault = Fault{kind, line, std::string(name(kind)) + ": " + what + "\n  do: " + advice(kind) + "\n"};
}

}  // namespace

Block& block() { return *the_block; }
const Index& index() { return the_block->now; }

const char* name(Kind kind) {
  constexpr const char* names[] = {"race",       "in flight", "uninitialised", "bounds",  "misaligned",
                                   "divergence", "deadlock",  "read only",     "operand", "launch"};
  return names[static_cast<int>(kind)];
}

std::string where(const Block& b, int thread) {
  char text[160];
  snprintf(text, sizeof text, "block (%d, %d, %d) thread %d (warp %d lane %d)", b.now.block[0],
           b.now.block[1], b.now.block[2], thread, thread / 32, thread % 32);
  return text;
}

void fail(Kind kind, Site at, const char* format, ...) {
  char what[1000];
  va_list list;
  va_start(list, format);
  vsnprintf(what, sizeof what, format, list);
  va_end(list);
  Block& b = block();
  record(
      b.launch.run, kind, at.line(),
      std::string(what) + "\n  at " + text(at) + ", " + where(b, b.now.thread) + "\n  in " + b.launch.kernel);
  throw *b.launch.run.fault;
}

// --- scheduling ---
Block::Block(Launch& launch_, const Index& index, uint32_t number, int shared_bytes)
    : now(index),
      launch(launch_),
      block_number(number),
      shared(shared_bytes, 0xff) {  // 0xff..: NaN in every type
  clocks.reset(now.threads);
  shadow.reset(shared_bytes);
  threads_.resize(now.threads);
  warps_.resize(now.threads / 32);
  order_.resize(warps_.size());
  std::iota(order_.begin(), order_.end(), 0);
  const Run& run = launch.run;
  if (run.schedule == Schedule::reverse) std::reverse(order_.begin(), order_.end());
  if (run.schedule == Schedule::random) {
    std::shuffle(order_.begin(), order_.end(), launch.random);
    interrupt_at_ = launch.random() % 1000;
  }
  for (Warp& w : warps_) {
    w.ready = 0xffffffffu;
    w.reverse =
        run.schedule == Schedule::reverse || (run.schedule == Schedule::random && launch.random() % 2);
  }
  launch.meter.start_block(static_cast<int>(warps_.size()));
}

void Block::entry() {
  Fiber::entered();
  Block& b = *the_block;
  const int thread = b.now.thread;
  try {
    (*b.body_)();
  } catch (const Fault&) {
    // recorded by fail(); the scheduler stops
  }
  b.threads_[thread].state = Thread::State::done;
  b.warp().ready &= ~(1u << (thread % 32));
  --b.live_;
  fiber(thread).leave(true);
}

int Block::pick() {
  for (int w : order_)
    if (const uint32_t ready = warps_[w].ready)
      return 32 * w + (warps_[w].reverse ? 31 - __builtin_clz(ready) : __builtin_ctz(ready));
  return -1;
}

void Block::run(const std::function<void()>& body) {
  the_block = this;
  body_ = &body;
  live_ = now.threads;
  for (int t = 0; t < now.threads; ++t) fiber(t).start(entry);
  while (live_ > 0 && !launch.run.fault) {
    const int next = pick();
    if (next < 0) {
      report_deadlock();
      break;
    }
    ++step;
    while (!landings.empty() && landings.begin()->first <= step) {
      land(*landings.begin()->second);
      landings.erase(landings.begin());
    }
    now.thread = next;
    fiber(next).enter();
  }
  the_block = nullptr;
}

void Block::pause(const char* operation, Site at) {
  const int thread = now.thread;
  Thread& t = threads_[thread];
  t.state = Thread::State::waiting;
  t.waits_in = operation;
  t.waits_at = at;
  warps_[thread / 32].ready &= ~(1u << (thread % 32));
  fiber(thread).leave();
}

void Block::wake(int thread) {
  threads_[thread].state = Thread::State::ready;
  warps_[thread / 32].ready |= 1u << (thread % 32);
}

void Block::interrupt() {
  if (launch.run.schedule != Schedule::random || accesses_++ < interrupt_at_) return;
  interrupt_at_ = accesses_ + launch.random() % 2000;
  const int thread = now.thread;
  warps_[thread / 32].reverse = launch.random() % 2;
  const auto mine = std::find(order_.begin(), order_.end(), thread / 32);
  std::rotate(mine, mine + 1, order_.end());  // this warp goes last ...
  std::swap(order_[0], order_[launch.random() % order_.size()]);
  fiber(thread).leave();
}

void Block::report_deadlock() {
  std::map<std::string, std::vector<int>> waiting;
  Kind kind = Kind::deadlock;
  for (int i = 0; i < now.threads; ++i) {
    const Thread& t = threads_[i];
    const bool done = t.state == Thread::State::done;
    waiting[done ? "have returned" : std::string("wait in ") + t.waits_in + " at " + text(t.waits_at)]
        .push_back(i);
  }
  for (const Warp& w : warps_)
    if (w.arrived) kind = Kind::divergence;  // some lanes wait for lanes of their own warp
  std::string what = kind == Kind::deadlock ? "nobody can go on" : "lanes of one warp wait for each other";
  for (const auto& [state, threads] : waiting) what += "\n  threads " + ranges(threads) + " " + state;
  char blocks[80];
  snprintf(blocks, sizeof blocks, "\n  block (%d, %d, %d)", now.block[0], now.block[1], now.block[2]);
  record(launch.run, kind, 0, what + blocks + " in " + launch.kernel);
}

// --- collectives and barriers ---
bool warp_enter(const char* operation, void* operands, Site at) {
  Block& b = block();
  Warp& w = b.warp();
  const int lane = b.now.thread % 32;
  if (w.arrived == 0) {
    w.operation = operation;
    w.at = at;
  } else if (!same(w.operation, operation) || !same(w.at, at)) {
    fail(Kind::divergence, at, "this lane reached %s while lanes 0x%08x of its warp wait in %s at %s",
         operation, w.arrived, w.operation, text(w.at).c_str());
  }
  w.operands[lane] = operands;
  w.arrived |= 1u << lane;
  if (w.arrived == 0xffffffffu) {
    b.launch.meter.meet(b.now.thread / 32);
    return true;
  }
  b.pause(operation, at);
  return false;
}

void* operands(int lane) { return block().warp().operands[lane]; }

void warp_leave() {
  Block& b = block();
  const int first = b.now.thread / 32 * 32;
  b.warp().arrived = 0;
  for (int l = 0; l < 32; ++l)
    if (first + l != b.now.thread) b.wake(first + l);
  b.interrupt();
}

void warp_barrier(Site at) {
  int nothing = 0;
  collective("warp_sync", nothing, at, [](auto) {
    Block& b = block();
    const int first = b.now.thread / 32 * 32;
    Clocks::Joint joint;
    for (int l = 0; l < 32; ++l) b.clocks.arrive(joint, first + l);
    for (int l = 0; l < 32; ++l) b.clocks.depart(joint, first + l);
  });
}

namespace {
void complete(Block& b, Barrier& barrier, Site at) {
  const Barrier full = std::move(barrier);
  barrier = Barrier{};
  for (int w = 0; w < b.now.threads / 32; ++w) {
    int lanes = 0;
    for (int t = 32 * w; t < 32 * w + 32; ++t) {
      lanes += full.here[t];
      if (full.waiting[t]) b.clocks.depart(full.joint, t);
      if (full.waiting[t] && t != b.now.thread) b.wake(t);
    }
    if (lanes != 0 && lanes != 32)
      fail(Kind::divergence, at, "%d lanes of warp %d took part in a barrier; whole warps do", lanes, w);
    if (lanes) b.launch.meter.meet(w);
  }
  if (full.waiting.count() == static_cast<size_t>(b.now.threads)) b.shadow.next_phase();
}

void arrive(int id, int count, bool wait, Site at, const char* operation) {
  Block& b = block();
  const int thread = b.now.thread;
  Barrier& barrier = b.barrier(id);
  if (barrier.count == 0) {
    barrier.count = count;
    barrier.at = at;
  }
  if (barrier.count != count)
    fail(Kind::operand, at, "barrier %d with %d threads here, with %d at %s", id, count, barrier.count,
         text(barrier.at).c_str());
  if (id == 0 && !same(barrier.at, at))
    fail(Kind::divergence, at, "this thread reached another block barrier than thread(s) waiting at %s",
         text(barrier.at).c_str());
  if (barrier.here[thread]) fail(Kind::operand, at, "this thread arrived twice at barrier %d", id);
  barrier.here[thread] = true;
  barrier.waiting[thread] = wait;
  b.clocks.arrive(barrier.joint, thread);
  if (++barrier.arrived < count) {
    if (wait) b.pause(operation, at);
    return;
  }
  complete(b, barrier, at);
  b.interrupt();
}
}  // namespace

void block_barrier(Site at) { arrive(0, block().now.threads, true, at, "barrier"); }

void named_barrier(int id, int count, bool wait, Site at) {
  if (id < 1 || id > 15) fail(Kind::operand, at, "barrier %d; 1 to 15 are free, 0 is barrier()", id);
  if (count < 32 || count % 32 || count > block().now.threads)
    fail(Kind::operand, at, "barrier %d with %d threads; whole warps of this block of %d", id, count,
         block().now.threads);
  arrive(id, count, wait, at, wait ? "barrier_sync" : "barrier_arrive");
}

void count_matrix(const char* operation) { ++block().launch.meter.counters().matrix[operation]; }

// --- launch ---
Run::Run() { runs().push_back(this); }
Run::~Run() { std::erase(runs(), this); }
Run* Run::current() { return runs().empty() ? nullptr : runs().back(); }

const Counters& Run::counters(const std::string& part) const {
  const Counters* found = nullptr;
  for (const auto& [kernel, counters] : kernels) {
    if (kernel.find(part) == std::string::npos) continue;
    if (found) throw std::out_of_range("simt: more than one kernel is called " + part);
    found = &counters;
  }
  if (!found) throw std::out_of_range("simt: no kernel is called " + part);
  return *found;
}

std::string Run::json() const {
  std::string out = "[";
  for (const auto& [kernel, counters] : kernels) out += (out.size() > 1 ? ", " : "") + counters.json(kernel);
  return out + "]";
}

int launch(const void* kernel, const int64_t (&grid)[3], int threads, int shared_bytes,
           const std::function<void()>& body) {
  Run* run = Run::current();
  if (!run) {
    fprintf(stderr, "simt: a launch needs a simt::Run\n");
    abort();
  }
  if (run->fault) return kLaunchFailure;
  const int64_t limit[3] = {0x7fffffff, 65535, 65535};
  for (int i = 0; i < 3; ++i)
    if (grid[i] < 1 || grid[i] > limit[i]) return kInvalidConfiguration;
  if (threads < 1 || threads > kMaxThreads) return kInvalidConfiguration;
  if (shared_bytes < 0 || shared_bytes > run->max_shared_bytes) return kInvalidValue;
  const std::string name = name_of(kernel);
  if (threads % 32) {
    record(*run, Kind::launch, 0, std::to_string(threads) + " threads are no whole warps\n  in " + name);
    return kLaunchFailure;
  }
  Counters& counters = run->kernels[name];
  Launch launch{name, *run, Meter(counters), std::mt19937_64(run->seed)};
  const int64_t blocks = grid[0] * grid[1] * grid[2];
  ++counters.launches;
  counters.blocks += blocks;
  counters.threads += blocks * threads;
  counters.shared_bytes = std::max<uint64_t>(counters.shared_bytes, shared_bytes);
  std::vector<int64_t> order(blocks);
  std::iota(order.begin(), order.end(), 0);
  if (run->schedule == Schedule::reverse) std::reverse(order.begin(), order.end());
  if (run->schedule == Schedule::random) std::shuffle(order.begin(), order.end(), launch.random);
  for (int64_t i : order) {
    const Index index{0,
                      threads,
                      {static_cast<int>(i % grid[0]), static_cast<int>(i / grid[0] % grid[1]),
                       static_cast<int>(i / grid[0] / grid[1])},
                      {static_cast<int>(grid[0]), static_cast<int>(grid[1]), static_cast<int>(grid[2])}};
    Block(launch, index, static_cast<uint32_t>(i), shared_bytes).run(body);
    if (run->fault) return kLaunchFailure;
  }
  return 0;
}

}  // namespace simt
