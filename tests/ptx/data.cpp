// SPDX-License-Identifier: Apache-2.0
// Moves and memory: mov, cvta, ld, st, atom, red, cp.async.
#include <algorithm>
#include <cstring>

#include "decode.h"

namespace lissom::ptx {
namespace {

// Cache and eviction hints: no effect on results. True when a cache policy operand follows.
bool hints(Decoder& d) {
  d.skip({"ca", "cg", "cs", "cv", "lu", "wb", "wt", "L1::evict_normal", "L1::evict_unchanged",
          "L1::evict_first", "L1::evict_last", "L1::no_allocate", "L2::evict_normal", "L2::evict_first",
          "L2::evict_last", "L2::64B", "L2::128B", "L2::256B"});
  return d.flag("L2::cache_hint");
}
// Blocks run one after the other and warps one instruction at a time, so every ordering is already the strongest one.
void ordering(Decoder& d) {
  d.skip({"weak", "volatile", "relaxed", "acquire", "release", "acq_rel", "sc"});
  d.skip({"cta", "gpu", "sys", "cluster"});
}
Space space_of(Decoder& d) {
  const auto name = d.any_of({"global", "shared", "shared::cta", "local", "const", "param", "param::entry"});
  if (name.empty()) return Space::generic;
  return name == "global"  ? Space::global
         : name == "local" ? Space::local
         : name == "const" ? Space::constant
         : name[0] == 'p'  ? Space::param
                           : Space::shared;
}
int vector_length(Decoder& d) {
  const auto v = d.any_of({"v2", "v4", "v8"});
  return v.empty() ? 1 : v[1] - '0';
}
uint64_t load(const uint8_t* from, int bytes) {
  uint64_t v = 0;
  std::memcpy(&v, from, bytes);
  return v;
}

void ld(Decoder& d) {
  ordering(d);
  const Space space = space_of(d);
  const bool read_only = d.flag("nc"), policy = hints(d);
  const int count = vector_length(d);
  const Type t = d.type();
  const int wide = std::max(d.width_of(d.peek()), t.width);
  const std::vector<int> to = d.destinations(t, count, true);
  const Address from = d.address();
  if (policy) d.source(kB64);
  const int bytes = t.bytes();
  const uint64_t out = wide == 64 ? ~0ull : (1ull << wide) - 1;
  const int up = 64 - t.width;
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const uint8_t* p = w.block.read(w, l, space, from.of(w, l), bytes * count, read_only);
      for (int i = 0; i < count; ++i) {
        uint64_t v = load(p + i * bytes, bytes);
        if (t.kind == Type::signed_) v = static_cast<uint64_t>(static_cast<int64_t>(v << up) >> up) & out;
        w.at(to[i], l) = v;
      }
    });
  };
}

void st(Decoder& d) {
  ordering(d);
  const Space space = space_of(d);
  const bool policy = hints(d);
  const int count = vector_length(d);
  const Type t = d.type();
  const Address to = d.address();
  std::vector<int> from;
  if (count == 1)
    from = {d.source_at_least(t)};
  else
    from = d.sources(t, count);
  if (policy) d.source(kB64);
  const int bytes = t.bytes();
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      uint8_t data[64];
      for (int i = 0; i < count; ++i) std::memcpy(data + i * bytes, &w.at(from[i], l), bytes);
      w.block.write(w, l, space, to.of(w, l), data, bytes * count);
    });
  };
}

// mov also packs and unpacks vectors.
void mov(Decoder& d) {
  const Type t = d.type();
  Operand to = d.take(), from = d.take();
  const auto pieces = [&](const Operand& o) { return static_cast<int>(o.parts.size()); };
  if (to.kind == Operand::vector && pieces(to) > 1) {
    std::vector<int> slots;
    const int width = t.total() / pieces(to);
    for (const Operand& part : to.parts)
      slots.push_back(part.text == "_" ? d.names.row() : d.slot_of(part, {Type::bits, width}));
    const int a = d.slot_of(from, t);
    d.instruction.op = [=](Warp& w) {
      const uint64_t mask = (1ull << width) - 1;
      w.each([&](int l) {
        const uint64_t v = w.at(a, l);
        for (size_t i = 0; i < slots.size(); ++i) w.at(slots[i], l) = v >> (i * width) & mask;
      });
    };
    return;
  }
  if (from.kind == Operand::vector && pieces(from) > 1) {
    std::vector<int> slots;
    const int width = t.total() / pieces(from), r = d.slot_of(to, t);
    for (const Operand& part : from.parts) slots.push_back(d.slot_of(part, {Type::bits, width}));
    d.instruction.op = [=](Warp& w) {
      w.each([&](int l) {
        uint64_t v = 0;
        for (size_t i = 0; i < slots.size(); ++i) v |= w.at(slots[i], l) << (i * width);
        w.at(r, l) = v;
      });
    };
    return;
  }
  const int r = d.slot_of(to, t), a = d.slot_of(from, t);
  map1<uint64_t, uint64_t>(d, r, a, [](uint64_t x) { return x; });
}

uint64_t window_of(Space s) {
  return s == Space::shared ? kSharedWindow : s == Space::local ? kLocalWindow : 0;
}

void cvta(Decoder& d) {
  const bool back = d.flag("to");
  const Space space = space_of(d);
  const Type t = d.type();
  const int to = d.destination(t), a = d.source(t);
  if (space == Space::generic || t.width != 64) d.fail("cvta needs a space and 64 bits");
  const uint64_t window = window_of(space);
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const uint64_t v = w.at(a, l);
      if (back && window && v - window >= kWindow)
        fault("cvta.to: %llx is no address of this space", static_cast<unsigned long long>(v));
      w.at(to, l) = back ? v - window : v + window;
    });
  };
}

void isspacep(Decoder& d) {
  const Space space = space_of(d);
  const int to = d.destination(kPredicate), a = d.source(kB64);
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      const uint64_t v = w.at(a, l);
      const Space is = v - kSharedWindow < kWindow  ? Space::shared
                       : v - kLocalWindow < kWindow ? Space::local
                                                    : Space::global;
      w.at(to, l) = is == space;
    });
  };
}

// --- atomics ---

using Update = uint64_t (*)(Type, uint64_t old, uint64_t b, uint64_t c);

int64_t as_signed(Type t, uint64_t v) { return static_cast<int64_t>(v << (64 - t.width)) >> (64 - t.width); }

uint64_t add(Type t, uint64_t a, uint64_t b, uint64_t) {
  if (!t.floating()) return a + b;
  if (t == Type{Type::f, 64}) return bits_of(double_of(a) + double_of(b));
  if (t == Type{Type::f, 32}) return bits_of(float_of(a) + float_of(b));
  uint64_t r = 0;
  for (int s = 0; s < t.total(); s += 16)
    r |= encode(t.format(), add_odd(decode(t.format(), a >> s & 0xffff), decode(t.format(), b >> s & 0xffff)))
         << s;
  return r;
}
bool below(Type t, uint64_t a, uint64_t b) {
  return t.kind == Type::signed_ ? as_signed(t, a) < as_signed(t, b) : a < b;
}

Update update_of(Decoder& d) {
  const auto name = d.one_of({"add", "min", "max", "and", "or", "xor", "exch", "cas", "inc", "dec"});
  if (name == "add") return add;
  if (name == "min") return [](Type t, uint64_t a, uint64_t b, uint64_t) { return below(t, b, a) ? b : a; };
  if (name == "max") return [](Type t, uint64_t a, uint64_t b, uint64_t) { return below(t, a, b) ? b : a; };
  if (name == "and") return [](Type, uint64_t a, uint64_t b, uint64_t) { return a & b; };
  if (name == "or") return [](Type, uint64_t a, uint64_t b, uint64_t) { return a | b; };
  if (name == "xor") return [](Type, uint64_t a, uint64_t b, uint64_t) { return a ^ b; };
  if (name == "exch") return [](Type, uint64_t, uint64_t b, uint64_t) { return b; };
  if (name == "cas") return [](Type, uint64_t a, uint64_t b, uint64_t c) { return a == b ? c : a; };
  if (name == "inc") return [](Type, uint64_t a, uint64_t b, uint64_t) { return a >= b ? 0 : a + 1; };
  return [](Type, uint64_t a, uint64_t b, uint64_t) { return a == 0 || a > b ? b : a - 1; };
}

void atomic(Decoder& d, bool returns) {
  ordering(d);
  const Space space = space_of(d);
  const bool cas = d.instruction.opcode.find(".cas") != std::string_view::npos;
  const Update f = update_of(d);
  d.skip({"noftz"});
  const bool policy = hints(d);
  const Type t = d.type();
  if (t.floating() && f != add) d.fail("a float atomic that is no add");
  const int to = returns ? d.destination(t) : d.names.row();
  const Address p = d.address();
  const int b = d.source(t), c = cas ? d.source(t) : b;
  if (policy) d.source(kB64);
  const bool flushes = t == Type{Type::f, 32} && space == Space::global;  // subnormals, in global memory only
  const auto flushed = [](uint64_t bits) { return encode(kF32, flush(kF32, decode(kF32, bits))); };
  d.instruction.op = [=](Warp& w) {
    // Any order of the lanes is possible.
    const int first = w.block.launch.options.seed > 1 ? static_cast<int>(w.block.random() % kLanes) : 0;
    for (int i = 0; i < kLanes; ++i) {
      const int l = (first + i) % kLanes;
      if (!(w.active >> l & 1)) continue;
      uint8_t* data = w.block.atomic(w, l, space, p.of(w, l), t.bytes());
      const uint64_t old = load(data, t.bytes());
      uint64_t fresh = f(t, old, w.at(b, l), w.at(c, l));
      if (flushes)
        fresh = encode(kF32, flush(kF32, decode(kF32, f(t, flushed(old), flushed(w.at(b, l)), 0))));
      std::memcpy(data, &fresh, t.bytes());
      w.at(to, l) = old;
    }
  };
}

// --- asynchronous copies ---

void cp(Decoder& d) {
  if (!d.flag("async")) d.fail("only cp.async is known");
  if (d.flag("commit_group")) {
    d.instruction.op = [](Warp& w) { w.each([&](int l) { w.block.commit_copies(w, l); }); };
    return;
  }
  if (d.flag("wait_all")) {
    d.instruction.op = [](Warp& w) { w.each([&](int l) { w.block.wait_all_copies(w, l); }); };
    return;
  }
  if (d.flag("wait_group")) {
    const uint64_t n = d.immediate();
    d.instruction.op = [n](Warp& w) { w.each([&](int l) { w.block.wait_copies(w, l, n); }); };
    return;
  }
  const bool cg = d.one_of({"ca", "cg"}) == "cg";
  d.one_of({"shared", "shared::cta"});
  d.one_of({"global"});
  const bool policy = hints(d);
  const Address to = d.address(), from = d.address();
  const uint64_t bytes = d.immediate();
  if (bytes != 16 && (cg || (bytes != 4 && bytes != 8))) d.fail("cp.async of this size");
  int size = -1, ignore = -1;
  if (d.more() && d.width_of(d.peek()) == 1)
    ignore = d.source(kPredicate);
  else if (d.more() && d.width_of(d.peek()) != 64)
    size = d.source(kU32);
  if (policy) d.source(kB64);
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) {
      uint64_t n = size < 0 ? bytes : w.at(size, l);
      if (ignore >= 0 && w.at(ignore, l) & 1) n = 0;
      if (n > bytes)
        fault("cp.async of %llu bytes with a source size of %u", static_cast<unsigned long long>(bytes),
              static_cast<unsigned>(n));
      w.block.issue_copy(w, l, to.of(w, l), from.of(w, l), static_cast<uint32_t>(bytes),
                         static_cast<uint32_t>(n));
    });
  };
}

void nothing(Decoder& d) {
  d.instruction.op = [](Warp&) {};
}

void fence(Decoder& d) {
  ordering(d);
  d.skip({"gl"});
  nothing(d);
}

void prefetch(Decoder& d) {
  space_of(d);
  d.one_of({"L1", "L2"});
  d.address();
  nothing(d);
}

void createpolicy(Decoder& d) {
  d.one_of({"fractional"});
  d.skip({"L2::evict_last", "L2::evict_normal", "L2::evict_first", "L2::evict_unchanged"});
  const Type t = d.type();
  const int to = d.destination(t);
  if (d.more()) d.source({Type::f, 32});
  d.instruction.op = [=](Warp& w) { w.each([&](int l) { w.at(to, l) = 0; }); };
}

}  // namespace

void add_data(Table& t) {
  t["mov"] = mov;
  t["cvta"] = cvta;
  t["isspacep"] = isspacep;
  t["ld"] = ld;
  t["st"] = st;
  t["atom"] = [](Decoder& d) { atomic(d, true); };
  t["red"] = [](Decoder& d) { atomic(d, false); };
  t["cp"] = cp;
  t["membar"] = fence;
  t["fence"] = fence;
  t["prefetch"] = prefetch;
  t["createpolicy"] = createpolicy;
}

}  // namespace lissom::ptx
