// SPDX-License-Identifier: Apache-2.0
// Control flow, barriers and the collectives of a warp. An operation runs with w.active = the lanes that take part, which
// run.cpp has brought together; here only the data moves.
#include <algorithm>

#include "decode.h"

namespace lissom::ptx {
namespace {

using Flow = Instruction::Flow;

void nothing(Decoder& d) {
  d.instruction.op = [](Warp&) {};
}

void bra(Decoder& d) {
  d.flag("uni");
  d.instruction.flow = Flow::branch;
  d.instruction.target = d.names.label(d.label());
  nothing(d);
}
void brx(Decoder& d) {
  d.one_of({"idx"});
  d.flag("uni");
  d.instruction.flow = Flow::table;
  d.instruction.index = d.source(kU32);
  d.label();
  nothing(d);
}
void leave(Decoder& d) {
  d.flag("uni");
  d.instruction.flow = Flow::exit;
  nothing(d);
}
void trap(Decoder& d) {
  d.instruction.op = [](Warp& w) {
    if (w.active) fault("trap");
  };
}

// --- barriers ---

void warp_barrier(Decoder& d) {
  d.one_of({"sync"});
  d.instruction.flow = Flow::collective;
  d.instruction.member = d.source(kB32);
  d.instruction.op = [](Warp& w) { w.block.syncwarp(w, w.active); };
}

uint32_t uniform(Warp& w, int slot, const char* what) {
  const int first = std::countr_zero(w.active);
  w.each([&](int l) {
    if (w.at(slot, l) != w.at(slot, first)) fault("the lanes disagree about the %s", what);
  });
  return static_cast<uint32_t>(w.at(slot, first));
}

// Without .aligned PTX lets the lanes of a warp arrive one by one; here all must come together, as in the aligned form.
void bar(Decoder& d) {
  if (d.flag("warp")) return warp_barrier(d);
  d.skip({"cta"});
  const auto how = d.one_of({"sync", "arrive", "red"});
  d.skip({"aligned"});
  d.instruction.flow = Flow::barrier;
  if (how != "red") {
    const int id = d.source(kU32), count = d.more() ? d.source(kU32) : -1;
    if (how == "arrive" && count < 0) d.fail("arrive needs a count");
    d.instruction.op = [=](Warp& w) {
      w.block.barrier(w, {uniform(w, id, "barrier"),
                          count < 0 ? 0 : uniform(w, count, "thread count"),
                          how == "sync",
                          0,
                          0,
                          {}});
    };
    return;
  }
  const auto what = d.one_of({"popc", "and", "or"});
  const Type t = d.type();
  const int to = d.destination(t), id = d.source(kU32);
  int count = -1;
  if (d.more() && !d.peek().negated && d.width_of(d.peek()) != 1) count = d.source(kU32);
  const Predicate p = d.predicate();
  d.instruction.op = [=](Warp& w) {
    uint32_t votes = 0;
    w.each([&](int l) { votes |= static_cast<uint32_t>(p.of(w, l)) << l; });
    const auto result = [=](Warp& v, Reduced r) {
      v.each([&](int l) { v.at(to, l) = what == "popc" ? r.count : what == "and" ? r.all : r.any; });
    };
    w.block.barrier(w, {uniform(w, id, "barrier"), count < 0 ? 0 : uniform(w, count, "thread count"), true,
                        votes, w.active, result});
  };
}

// --- collectives ---

void shfl(Decoder& d) {
  d.one_of({"sync"});
  const auto mode = d.one_of({"up", "down", "bfly", "idx"});
  const Type t = d.type();
  const auto [to, valid] = d.value_and_predicate(t);
  const int a = d.source(t), b = d.source(kU32), c = d.source(kU32);
  const int out = to, p = valid;
  d.instruction.flow = Flow::collective;
  d.instruction.member = d.source(kB32);
  d.instruction.op = [=](Warp& w) {
    uint64_t values[kLanes] = {};
    w.each([&](int l) { values[l] = w.at(a, l); });
    w.each([&](int l) {
      const int delta = w.at(b, l) & 31, clamp = w.at(c, l) & 31, segment = w.at(c, l) >> 8 & 31;
      const int low = l & segment, limit = low | (clamp & ~segment);
      int j = 0;
      bool ok = false;
      if (mode == "up") j = l - delta, ok = j >= limit;
      if (mode == "down") j = l + delta, ok = j <= limit;
      if (mode == "bfly") j = l ^ delta, ok = j <= limit;
      if (mode == "idx") j = low | (delta & ~segment), ok = j <= limit;
      if (!ok) j = l;
      if (!(w.active >> j & 1)) fault("shfl: lane %d reads from lane %d, which does not take part", l, j);
      w.at(out, l) = values[j];
      w.at(p, l) = ok;
    });
  };
}

void vote(Decoder& d) {
  d.one_of({"sync"});
  const auto mode = d.one_of({"all", "any", "uni", "ballot"});
  const Type t = d.type();
  const int to = d.destination(t);
  const Predicate p = d.predicate();
  d.instruction.flow = Flow::collective;
  d.instruction.member = d.source(kB32);
  d.instruction.op = [=](Warp& w) {
    uint32_t votes = 0;
    w.each([&](int l) { votes |= static_cast<uint32_t>(p.of(w, l)) << l; });
    const bool all = votes == w.active, any = votes;
    w.each([&](int l) {
      w.at(to, l) = mode == "ballot" ? votes : mode == "all" ? all : mode == "any" ? any : all || !any;
    });
  };
}

void match(Decoder& d) {
  const bool all = d.one_of({"all", "any"}) == "all";
  d.one_of({"sync"});
  const Type t = d.type();
  const auto [to, valid] = d.value_and_predicate(kB32);
  const int out = to, p = valid, a = d.source(t);
  d.instruction.flow = Flow::collective;
  d.instruction.member = d.source(kB32);
  d.instruction.op = [=](Warp& w) {
    uint32_t same[kLanes] = {};
    w.each([&](int l) {
      w.each([&](int k) { same[l] |= static_cast<uint32_t>(w.at(a, k) == w.at(a, l)) << k; });
    });
    w.each([&](int l) {
      w.at(out, l) = all && same[l] != w.active ? 0 : same[l];
      w.at(p, l) = same[l] == w.active;
    });
  };
}

void redux(Decoder& d) {
  d.one_of({"sync"});
  const auto op = d.one_of({"add", "min", "max", "and", "or", "xor"});
  const Type t = d.type();
  if (t.floating()) d.fail("redux of floats is not known");
  const int to = d.destination(t), a = d.source(t);
  d.instruction.flow = Flow::collective;
  d.instruction.member = d.source(kB32);
  const bool s = t.kind == Type::signed_;
  d.instruction.op = [=](Warp& w) {
    const auto less = [s](uint32_t x, uint32_t y) {
      return s ? static_cast<int32_t>(x) < static_cast<int32_t>(y) : x < y;
    };
    auto r = static_cast<uint32_t>(w.at(a, std::countr_zero(w.active)));
    const uint32_t rest = w.active & (w.active - 1);
    for (int l = 0; l < kLanes; ++l) {
      if (!(rest >> l & 1)) continue;
      const auto x = static_cast<uint32_t>(w.at(a, l));
      if (op == "add") r += x;
      if (op == "min") r = less(x, r) ? x : r;
      if (op == "max") r = less(r, x) ? x : r;
      if (op == "and") r &= x;
      if (op == "or") r |= x;
      if (op == "xor") r ^= x;
    }
    w.each([&](int l) { w.at(to, l) = r; });
  };
}

void elect(Decoder& d) {
  d.one_of({"sync"});
  const auto [to, leader] = d.value_and_predicate(kB32);
  const int out = to, p = leader;
  d.instruction.flow = Flow::collective;
  d.instruction.member = d.source(kB32);
  d.instruction.op = [=](Warp& w) {
    const int first = std::countr_zero(w.active);
    w.each([&](int l) { w.at(out, l) = first, w.at(p, l) = l == first; });
  };
}

void activemask(Decoder& d) {
  d.type();
  const int to = d.destination(kB32);
  d.instruction.op = [=](Warp& w) { w.each([&](int l) { w.at(to, l) = w.active; }); };
}

void nanosleep(Decoder& d) {
  d.type();
  d.source(kU32);
  nothing(d);
}

}  // namespace

void add_warp(Table& t) {
  t["bra"] = bra;
  t["brx"] = brx;
  t["ret"] = leave;
  t["exit"] = leave;
  t["trap"] = trap;
  t["bar"] = bar;
  t["barrier"] = bar;
  t["shfl"] = shfl;
  t["vote"] = vote;
  t["match"] = match;
  t["redux"] = redux;
  t["elect"] = elect;
  t["activemask"] = activemask;
  t["nanosleep"] = nanosleep;
}

}  // namespace lissom::ptx
