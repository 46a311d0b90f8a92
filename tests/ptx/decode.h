// SPDX-License-Identifier: Apache-2.0
// From the text of one instruction to an Instruction. Each operation has a function that takes its modifiers and operands from
// a Decoder; whatever it leaves is an error, so nothing is ever ignored by accident.
#pragma once

#include <initializer_list>
#include <optional>

#include "machine.h"
#include "number.h"

namespace lissom::ptx {

struct Type {
  enum Kind : uint8_t { bits, unsigned_, signed_, f, bf, tf, e4m3, e5m2, predicate } kind;
  int width;      // bits of one element
  int count = 1;  // packed elements
  int total() const { return width * count; }
  int bytes() const { return total() / 8; }
  bool integer() const { return kind == unsigned_ || kind == signed_ || kind == bits; }
  bool floating() const { return !integer() && kind != predicate; }
  const Format& format() const;
  bool operator==(const Type&) const = default;
};
std::optional<Type> type_named(std::string_view name);
constexpr Type kPredicate{Type::predicate, 1};
constexpr Type kB32{Type::bits, 32}, kB64{Type::bits, 64}, kU32{Type::unsigned_, 32};

struct Operand {
  enum Kind : uint8_t { name, integer, real, memory, vector } kind = name;
  std::string text;            // of a name, also of a memory operand's base
  uint64_t value = 0;          // literal; offset of a memory operand or a name
  int real_bits = 0;           // 32: 0f..., 64: 0d... or decimal
  bool negated = false;        // !p
  std::vector<Operand> parts;  // of a vector; or the q of p|q
};

struct Register {
  int slot;
  int width;  // 1: predicate
};
struct Predicate {
  int slot;
  bool negated;
  bool of(Warp& w, int lane) const { return (w.at(slot, lane) & 1) != negated; }
};
struct Address {
  int slot;
  uint64_t offset;
  bool narrow;  // a 32-bit register: the sum wraps in 32 bits
  uint64_t of(Warp& w, int lane) const {
    const uint64_t sum = w.at(slot, lane) + offset;
    return narrow ? static_cast<uint32_t>(sum) : sum;
  }
};

// Names of one kernel while its text is read.
struct Names {
  Module& module;
  Kernel& kernel;
  std::vector<std::map<std::string, Register, std::less<>>> scopes;
  std::map<std::string, Variable, std::less<>> variables;  // shared, local, const, global, param
  std::map<std::string, int, std::less<>> labels;
  std::map<std::string, std::vector<int>, std::less<>> tables;  // .branchtargets
  std::map<uint64_t, int> literals;
  std::map<std::string, int, std::less<>> specials;

  int row() { return kernel.registers++; }
  int label(const std::string& name);
  int literal(uint64_t value);
  int special(const std::string& name);
  const Register* find(std::string_view name) const;
};

class Decoder {
 public:
  Decoder(Names& names, Instruction& instruction, std::vector<Operand> operands);
  [[noreturn]] void fail(const std::string& why) const;

  // Modifiers, in any order (ptxas has checked it). flag and one_of take them away.
  bool flag(std::string_view name);
  std::string_view one_of(std::initializer_list<std::string_view> names);  // exactly one
  std::string_view any_of(std::initializer_list<std::string_view> names);  // one or none ("")
  void skip(std::initializer_list<std::string_view> hints);  // all of these: no effect on results
  Type type();
  Round rounding();
  bool has_type() const;

  // Operands, from left to right.
  bool more() const { return next_ < operands_.size(); }
  const Operand& peek() const;
  int source(Type);
  int destination(Type);
  int destination_at_least(Type);  // ld, cvt: the register may be wider
  int source_at_least(Type);
  int width_of(const Operand&) const;
  std::vector<int> sources(Type, int count);
  std::vector<int> destinations(Type, int count, bool wider = false);
  Predicate predicate();
  std::pair<int, int> predicate_pair();  // p|q, q or both may be a sink
  std::pair<int, int> value_and_predicate(Type);
  Address address();
  uint64_t immediate();
  std::string label();
  Operand take();
  int slot_of(const Operand&, Type, bool wider = false);

  Names& names;
  Instruction& instruction;

 private:
  int target_slot(const Operand&, Type, bool wider);

  std::vector<std::string_view> modifiers_;
  std::vector<bool> used_;
  std::vector<Operand> operands_;
  size_t next_ = 0;

 public:
  void finish() const;
};

using Table = std::map<std::string_view, void (*)(Decoder&)>;
void add_integer(Table&);   // integer.cpp
void add_floating(Table&);  // floating.cpp
void add_compare(Table&);   // compare.cpp
void add_convert(Table&);   // convert.cpp
void add_data(Table&);      // data.cpp: mov, ld, st, atom, cp.async
void add_warp(Table&);      // warp.cpp: branches, barriers, collectives
void add_matrix(Table&);    // matrix.cpp

void decode(Names&, Instruction&, std::vector<Operand>);

// d = f(a, ...) in every active lane; register images of R and A... are converted by Warp::get and put.
template <class R, class A, class F>
void map1(Decoder& d, int to, int a, F f) {
  d.instruction.op = [=](Warp& w) { w.each([&](int l) { w.put<R>(to, l, f(w.get<A>(a, l))); }); };
}
template <class R, class A, class B, class F>
void map2(Decoder& d, int to, int a, int b, F f) {
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) { w.put<R>(to, l, f(w.get<A>(a, l), w.get<B>(b, l))); });
  };
}
template <class R, class A, class B, class C, class F>
void map3(Decoder& d, int to, int a, int b, int c, F f) {
  d.instruction.op = [=](Warp& w) {
    w.each([&](int l) { w.put<R>(to, l, f(w.get<A>(a, l), w.get<B>(b, l), w.get<C>(c, l))); });
  };
}

// Calls f with a zero of the C++ type that holds an integer PTX type.
template <class F>
void with_integer(Type t, F f) {
  const bool s = t.kind == Type::signed_;
  switch (t.width) {
    case 8: return s ? f(int8_t{}) : f(uint8_t{});
    case 16: return s ? f(int16_t{}) : f(uint16_t{});
    case 32: return s ? f(int32_t{}) : f(uint32_t{});
    default: return s ? f(int64_t{}) : f(uint64_t{});
  }
}

}  // namespace lissom::ptx
