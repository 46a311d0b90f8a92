// SPDX-License-Identifier: Apache-2.0
// Runs a launch: blocks one by one, warps interleaved by the schedule, the lanes of a warp lowest pc first. Lanes that diverged
// join again when their pcs meet; at a collective they wait until all lanes that it names stand at the same instruction.
#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "machine.h"

namespace lissom::ptx {

using Flow = Instruction::Flow;

// --- warp ---

Warp::Warp(Block& owner, int number)
    : block(owner),
      index(number),
      carry(kLanes),
      rows_(static_cast<size_t>(owner.launch.kernel.registers) * kLanes) {
  const Kernel& k = owner.launch.kernel;
  if (k.local_bytes > kLocalBase) local.resize((k.local_bytes - kLocalBase) * kLanes);
}

void Warp::reset() {
  // Registers hold anything before their first write.
  std::memset(rows_.data(), static_cast<int>(0xa5 ^ (block.launch.options.seed * 0x1d)) & 0xff,
              rows_.size() * 8);
  std::fill(local.begin(), local.end(), uint8_t{0xcb});
  std::fill(carry.begin(), carry.end(), 0);
  const auto threads = static_cast<int>(block.launch.threads.count());
  const int lanes = std::min(kLanes, threads - index * kLanes);
  live = lanes == kLanes ? kAllLanes : (1u << lanes) - 1;
  groups.assign(1, {0, live});
  armed.clear();
  waiting = false;
}

void Warp::join(int at, uint32_t lanes) {
  if (!lanes) return;
  auto it = std::find_if(groups.begin(), groups.end(), [&](const Group& g) { return g.pc >= at; });
  if (it != groups.end() && it->pc == at)
    it->lanes |= lanes;
  else
    groups.insert(it, {at, lanes});
}

// --- block ---

Block::Block(Launch& l)
    : launch(l),
      random(l.options.seed),
      kernel_(l.kernel),
      clocks_(static_cast<int>(l.threads.count())),
      copies_(l.threads.count()) {
  const uint64_t align = kernel_.dynamic_align;
  const uint64_t begin = (kSharedBase + kernel_.static_shared + align - 1) / align * align;
  shared_.resize(begin - kSharedBase + l.dynamic_shared);
  shadow_ = std::make_unique<Shadow>(nullptr, shared_.size(), false);
  const auto warps = static_cast<int>((l.threads.count() + kLanes - 1) / kLanes);
  for (int i = 0; i < warps; ++i) warps_.push_back(std::make_unique<Warp>(*this, i));
  priority_.resize(warps);
}

uint64_t Block::special(std::string_view name, const Warp& w, int lane) const {
  const Dim t = launch.threads, g = launch.grid;
  const auto thread = static_cast<uint32_t>(w.thread(lane));
  const auto component = [&](const Dim& d) {
    return name.back() == 'x' ? d.x : name.back() == 'y' ? d.y : d.z;
  };
  if (name.starts_with("%tid")) return component({thread % t.x, thread / t.x % t.y, thread / t.x / t.y});
  if (name.starts_with("%ntid")) return component(t);
  if (name.starts_with("%ctaid")) return component(index_);
  if (name.starts_with("%nctaid")) return component(g);
  if (name == "%laneid") return lane;
  if (name == "%warpid") return w.index;
  if (name == "%nwarpid") return warps_.size();
  if (name == "%dynamic_smem_size") return launch.dynamic_shared;
  if (name == "%total_smem_size") return shared_.size();
  const uint32_t me = 1u << lane;
  if (name == "%lanemask_eq") return me;
  if (name == "%lanemask_lt") return me - 1;
  if (name == "%lanemask_le") return me | (me - 1);
  if (name == "%lanemask_gt") return ~(me | (me - 1));
  return ~(me - 1);  // ge
}

void Block::fill(Warp& w) {
  w.reset();
  const uint64_t dynamic = kSharedBase + shared_.size() - launch.dynamic_shared;
  for (const Constant& c : kernel_.constants)
    for (int lane = 0; lane < kLanes; ++lane)
      w.at(c.slot, lane) =
          c.special.empty() ? c.value + (c.variable >= 0 ? dynamic : 0) : special(c.special, w, lane);
}

void Block::run(Dim index, uint32_t number) {
  index_ = index;
  number_ = number;
  shadow_->clear();
  std::fill(shared_.begin(), shared_.end(), uint8_t{0xfb});
  clocks_.reset();
  std::fill(copies_.begin(), copies_.end(), Copies{});
  for (Barrier& b : barriers_) b = {};
  for (auto& w : warps_) fill(*w);
  for (size_t i = 0; i < priority_.size(); ++i) {
    const uint64_t seed = launch.options.seed;
    priority_[i] = seed == 0 ? priority_.size() - i : seed == 1 ? i : random();
  }
  slice_ = 0;
  current_ = nullptr;
  while (Warp* w = choose()) {
    step(*w);
    // Nobody else can free lanes that wait for lanes of their own warp.
    if (w->groups.empty() && !w->armed.empty()) report_deadlock();
  }
  for (auto& w : warps_)
    if (w->live) report_deadlock();
}

std::string Block::where() const {
  if (!current_) return "";
  const Instruction& in = kernel_.code[current_->pc];
  return ", warp " + std::to_string(current_->index) + ", line " + std::to_string(in.line) + " \"" +
         std::string(in.text) + "\"";
}

// The runnable warp of highest priority; under a random schedule priorities change now and then, so that warps drift far apart.
Warp* Block::choose() {
  if (slice_ && current_ && current_->runnable()) {
    --slice_;
    return current_;
  }
  const bool random_order = launch.options.seed > 1;
  if (random_order && current_ && random() % 4 == 0) priority_[current_->index] = random();
  Warp* best = nullptr;
  for (auto& w : warps_)
    if (w->runnable() && (!best || priority_[w->index] > priority_[best->index])) best = w.get();
  current_ = best;
  slice_ = random_order ? random() % 400 : 1000;
  return best;
}

void Block::report_deadlock() {
  std::string text = "divergent or dead:";
  const auto line = [&](int pc) {
    return " at line " + std::to_string(kernel_.code[pc].line) + " \"" + std::string(kernel_.code[pc].text) +
           "\"";
  };
  for (auto& w : warps_) {
    if (!w->live) continue;
    text += " warp " + std::to_string(w->index);
    if (w->waiting) text += " waits at barrier " + std::to_string(w->call.id) + line(w->pc);
    for (const auto& g : w->armed) {
      char lanes[40];
      snprintf(lanes, sizeof lanes, " lanes %08x wait for others", g.lanes);
      text += lanes + line(g.pc);
    }
    text += ";";
  }
  fault("%s", text.c_str());
}

// One instruction of the lanes at the lowest pc.
void Block::step(Warp& w) {
  const Warp::Group g = w.groups.front();
  Instruction& in = kernel_.code[g.pc];
  w.pc = g.pc;
  if (++steps_ > launch.options.max_steps)
    fault("no end after %llu instructions", static_cast<unsigned long long>(steps_));
  uint32_t active = g.lanes;
  if (in.guard >= 0)
    for (int l = 0; l < kLanes; ++l)
      if ((g.lanes >> l & 1) && (w.at(in.guard, l) & 1) == in.negated) active &= ~(1u << l);
  w.active = active;
  if (in.flow == Flow::next) {
    if (active) {
      ++in.executed;
      in.op(w);
    }
    if (w.groups.size() == 1) {
      ++w.groups.front().pc;
      return;
    }
    w.groups.erase(w.groups.begin());
    w.join(g.pc + 1, g.lanes);
    return;
  }
  w.groups.erase(w.groups.begin());
  w.join(g.pc + 1, g.lanes & ~active);
  if (!active) return;
  switch (in.flow) {
    case Flow::branch:
      ++in.executed;
      w.join(kernel_.labels[in.target], active);
      break;
    case Flow::table:
      ++in.executed;
      w.each([&](int l) {
        const uint64_t i = w.at(in.index, l);
        if (i >= in.targets.size())
          fault("brx.idx: index %llu of %zu", static_cast<unsigned long long>(i), in.targets.size());
        w.join(kernel_.labels[in.targets[i]], 1u << l);
      });
      break;
    case Flow::exit:
      ++in.executed;
      leave(w, active);
      break;
    default: gather(w, g.pc, active); break;
  }
}

// Collects the lanes that a collective or barrier wants, in sets of one member mask; a set that is complete fires.
void Block::gather(Warp& w, int pc, uint32_t active) {
  const Instruction& in = kernel_.code[pc];
  uint32_t here = active;
  if (auto it = std::find_if(w.armed.begin(), w.armed.end(), [&](const auto& a) { return a.pc == pc; });
      it != w.armed.end()) {
    here |= it->lanes;
    w.armed.erase(it);
  }
  uint32_t stay = 0;
  while (here) {
    uint32_t set = here, mask = kAllLanes;
    if (in.member >= 0) {
      mask = static_cast<uint32_t>(w.at(in.member, std::countr_zero(here)));
      set = 0;
      for (int l = 0; l < kLanes; ++l)
        if ((here >> l & 1) && static_cast<uint32_t>(w.at(in.member, l)) == mask) set |= 1u << l;
      if (set & ~mask)
        fault("lanes %08x execute a collective whose member mask %08x does not name them", set & ~mask, mask);
      // PTX would go on without them; but which lanes have left by then is a matter of timing.
      if (mask & ~w.live)
        fault("divergent collective: its mask names lanes %08x, which have left", mask & ~w.live);
    }
    here &= ~set;
    if (set == (mask & w.live))
      fire(w, pc, set);
    else
      stay |= set;
  }
  if (stay) w.armed.push_back({pc, stay});
}

void Block::fire(Warp& w, int pc, uint32_t lanes) {
  Instruction& in = kernel_.code[pc];
  ++in.executed;
  w.pc = pc;
  w.active = lanes;
  in.op(w);
  w.join(pc + 1, lanes);
}

void Block::leave(Warp& w, uint32_t lanes) {
  w.live &= ~lanes;
  for (const auto& g : std::exchange(w.armed, {})) gather(w, g.pc, g.lanes);  // they wait for fewer now
  if (w.live) return;
  for (uint32_t id = 0; id < kBarriers; ++id) complete(id);
}

void Block::syncwarp(Warp& w, uint32_t lanes) { clocks_.syncwarp(w.index, lanes); }

void Block::barrier(Warp& w, BarrierCall call) {
  if (call.id >= kBarriers) fault("barrier %u of %d", call.id, kBarriers);
  if (call.count % kLanes || call.count > warps_.size() * kLanes)
    fault("a barrier of %u threads", call.count);
  Barrier& b = barriers_[call.id];
  const uint32_t me = 1u << w.index;
  if (b.warps & me) fault("warp %d arrives twice at barrier %u", w.index, call.id);
  if (b.warps && b.count != call.count)
    fault("barrier %u: %u threads here, %u elsewhere", call.id, call.count, b.count);
  if (b.warps && call.count == 0 && b.pc != w.pc)
    fault("divergent barrier: other warps wait at line %d", kernel_.code[b.pc].line);
  b.warps |= me;
  b.count = call.count;
  b.pc = w.pc;
  clocks_.release(w.index, w.active, b.sum);
  b.reduced.count += static_cast<uint32_t>(std::popcount(call.votes));
  b.reduced.all &= call.votes == call.voters;
  b.reduced.any |= call.votes != 0;
  if (call.waits) {
    b.waiting |= me;
    w.waiting = true;
    w.call = call;
  }
  complete(call.id);
}

// Without a count a barrier waits for every warp that has not exited.
void Block::complete(uint32_t id) {
  Barrier& b = barriers_[id];
  if (!b.warps) return;
  for (const auto& w : warps_)
    if (b.count == 0 && w->live && !(b.warps >> w->index & 1)) return;
  if (b.count && static_cast<uint32_t>(std::popcount(b.warps)) * kLanes < b.count) return;
  const Barrier done = std::exchange(b, {});
  const auto sum = std::make_shared<const Clocks::Vector>(done.sum);
  for (const auto& w : warps_) {
    if (!(done.waiting >> w->index & 1)) continue;
    clocks_.acquire(w->index, w->live, sum);
    w->waiting = false;
    w->active = w->live;
    if (w->call.result) w->call.result(*w, done.reduced);
  }
}

// --- launch ---

void run(Launch& launch) {
  const Kernel& k = launch.kernel;
  Memory& memory = launch.memory;
  for (auto& [name, g] : launch.module.globals)
    if (g.space == Space::global) memory.add(g.data, g.bytes, true, "variable " + name);
  memory.begin_launch(launch.options.global_shadow);
  std::vector<uint32_t> order(launch.grid.count());
  std::iota(order.begin(), order.end(), 0u);
  if (launch.options.seed == 1) std::reverse(order.begin(), order.end());
  std::mt19937_64 random(launch.options.seed);
  if (launch.options.seed > 1) std::shuffle(order.begin(), order.end(), random);
  std::string text;
  Block block(launch);
  for (const uint32_t i : order) {
    const Dim index{i % launch.grid.x, i / launch.grid.x % launch.grid.y, i / launch.grid.x / launch.grid.y};
    try {
      block.run(index, i + 1);
    } catch (const Fault& f) {
      text = "kernel " + k.name + ", block (" + std::to_string(index.x) + ", " + std::to_string(index.y) +
             ", " + std::to_string(index.z) + ")" + block.where() + ": " + f.what();
      break;
    }
  }
  for (auto& [name, g] : launch.module.globals)
    if (g.space == Space::global) memory.remove(g.data);
  if (!text.empty()) throw Fault(text);
}

}  // namespace lissom::ptx
