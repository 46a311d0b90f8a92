// SPDX-License-Identifier: Apache-2.0
#include "decode.h"

#include <cstring>
#include <utility>

namespace lissom::ptx {

const Format& Type::format() const {
  switch (kind) {
    case bf: return kBf16;
    case tf: return kTf32;
    case Type::e4m3: return kE4m3;
    case Type::e5m2: return kE5m2;
    default: return width == 16 ? kF16 : kF32;
  }
}

std::optional<Type> type_named(std::string_view name) {
  static const std::map<std::string_view, Type> kTypes = {
      {"b8", {Type::bits, 8}},
      {"b16", {Type::bits, 16}},
      {"b32", {Type::bits, 32}},
      {"b64", {Type::bits, 64}},
      {"u8", {Type::unsigned_, 8}},
      {"u16", {Type::unsigned_, 16}},
      {"u32", {Type::unsigned_, 32}},
      {"u64", {Type::unsigned_, 64}},
      {"s8", {Type::signed_, 8}},
      {"s16", {Type::signed_, 16}},
      {"s32", {Type::signed_, 32}},
      {"s64", {Type::signed_, 64}},
      {"f16", {Type::f, 16}},
      {"f32", {Type::f, 32}},
      {"f64", {Type::f, 64}},
      {"f16x2", {Type::f, 16, 2}},
      {"bf16", {Type::bf, 16}},
      {"bf16x2", {Type::bf, 16, 2}},
      {"tf32", {Type::tf, 32}},
      {"pred", kPredicate},
      {"u16x2", {Type::unsigned_, 16, 2}},
      {"s16x2", {Type::signed_, 16, 2}},
      {"e4m3x2", {Type::e4m3, 8, 2}},
      {"e5m2x2", {Type::e5m2, 8, 2}},
      {"e4m3", {Type::e4m3, 8}},
      {"e5m2", {Type::e5m2, 8}},
  };
  const auto it = kTypes.find(name);
  return it == kTypes.end() ? std::nullopt : std::optional(it->second);
}

// --- names ---

int Names::label(const std::string& name) {
  const auto [it, fresh] = labels.try_emplace(name, static_cast<int>(kernel.labels.size()));
  if (fresh) kernel.labels.push_back(-1);
  return it->second;
}

int Names::literal(uint64_t value) {
  const auto [it, fresh] = literals.try_emplace(value, kernel.registers);
  if (fresh) kernel.constants.push_back({row(), value, -1, {}});
  return it->second;
}

int Names::special(const std::string& name) {
  static const std::map<std::string_view, int> kKnown = {
      {"%tid.x", 32},           {"%tid.y", 32},       {"%tid.z", 32},
      {"%ntid.x", 32},          {"%ntid.y", 32},      {"%ntid.z", 32},
      {"%ctaid.x", 32},         {"%ctaid.y", 32},     {"%ctaid.z", 32},
      {"%nctaid.x", 32},        {"%nctaid.y", 32},    {"%nctaid.z", 32},
      {"%laneid", 32},          {"%warpid", 32},      {"%nwarpid", 32},
      {"%lanemask_eq", 32},     {"%lanemask_lt", 32}, {"%lanemask_le", 32},
      {"%lanemask_gt", 32},     {"%lanemask_ge", 32}, {"%dynamic_smem_size", 32},
      {"%total_smem_size", 32},
  };
  const auto known = kKnown.find(name);
  if (known == kKnown.end()) return -1;
  const auto [it, fresh] = specials.try_emplace(name, kernel.registers);
  if (fresh) kernel.constants.push_back({row(), 0, -1, known->first});
  return it->second;
}

const Register* Names::find(std::string_view name) const {
  for (auto scope = scopes.rbegin(); scope != scopes.rend(); ++scope)
    if (const auto it = scope->find(name); it != scope->end()) return &it->second;
  return nullptr;
}

// --- modifiers ---

Decoder::Decoder(Names& n, Instruction& i, std::vector<Operand> operands)
    : names(n), instruction(i), operands_(std::move(operands)) {
  std::string_view rest = i.opcode;
  for (size_t dot = rest.find('.'); dot != std::string_view::npos;) {
    rest.remove_prefix(dot + 1);
    dot = rest.find('.');
    modifiers_.push_back(rest.substr(0, dot));
  }
  used_.resize(modifiers_.size());
}

void Decoder::fail(const std::string& why) const {
  fault("line %d: %s: %s", instruction.line, why.c_str(), std::string(instruction.text).c_str());
}

bool Decoder::flag(std::string_view name) {
  for (size_t i = 0; i < modifiers_.size(); ++i)
    if (!used_[i] && modifiers_[i] == name) return used_[i] = true;
  return false;
}

std::string_view Decoder::any_of(std::initializer_list<std::string_view> choices) {
  for (const auto name : choices)
    if (flag(name)) return name;
  return "";
}

std::string_view Decoder::one_of(std::initializer_list<std::string_view> choices) {
  const auto found = any_of(choices);
  if (found.empty()) fail("unknown form, wanted one of ." + std::string(*choices.begin()) + " ...");
  return found;
}

void Decoder::skip(std::initializer_list<std::string_view> hints) {
  for (const auto hint : hints) flag(hint);
}

bool Decoder::has_type() const {
  for (size_t i = 0; i < modifiers_.size(); ++i)
    if (!used_[i] && type_named(modifiers_[i])) return true;
  return false;
}

Type Decoder::type() {
  for (size_t i = 0; i < modifiers_.size(); ++i) {
    if (used_[i]) continue;
    if (const auto t = type_named(modifiers_[i])) {
      used_[i] = true;
      return *t;
    }
  }
  fail("no known type");
}

Round Decoder::rounding() {
  const auto name = any_of({"rn", "rz", "rm", "rp"});
  return name == "rz" ? Round::zero : name == "rm" ? Round::down : name == "rp" ? Round::up : Round::even;
}

// --- operands ---

const Operand& Decoder::peek() const {
  if (!more()) fail("too few operands");
  return operands_[next_];
}

Operand Decoder::take() {
  const Operand& o = peek();
  ++next_;
  return o;
}

int Decoder::width_of(const Operand& o) const {
  if (o.kind == Operand::vector && !o.parts.empty()) return width_of(o.parts[0]);
  const Register* r = o.kind == Operand::name ? names.find(o.text) : nullptr;
  return r ? r->width : 0;
}

int Decoder::slot_of(const Operand& o, Type t, bool wider) {
  const uint64_t mask = t.total() >= 64 ? ~0ull : (1ull << t.total()) - 1;
  if (o.negated) fail("! in front of something that is no predicate");
  if (o.kind == Operand::integer) {
    if (t.floating()) fail("an integer literal for a float");
    return names.literal(o.value & mask);
  }
  if (o.kind == Operand::real) {
    if (t.integer() && t.kind != Type::bits) fail("a float literal for an integer");
    if (t.total() == o.real_bits) return names.literal(o.value);
    if (t.total() == 32) return names.literal(bits_of(static_cast<float>(double_of(o.value))));
    fail("a literal of another width");
  }
  if (o.kind == Operand::vector && o.parts.size() == 1) return slot_of(o.parts[0], t, wider);
  if (o.kind != Operand::name) fail("an operand of the wrong kind");
  if (const Register* r = names.find(o.text)) {
    if (o.value) fail("register plus offset");
    if (wider && r->width != 1 ? r->width < t.total() : r->width != t.total())
      fail("register " + o.text + " has " + std::to_string(r->width) + " bits, wanted " +
           std::to_string(t.total()));
    return r->slot;
  }
  if (const auto it = names.variables.find(o.text); it != names.variables.end()) {
    const Variable& v = it->second;
    if (v.space == Space::shared && v.bytes == 0) {  // the dynamic block lies behind the static ones
      names.kernel.constants.push_back({names.row(), o.value, 1, {}});
      return names.kernel.constants.back().slot;
    }
    return names.literal((v.offset + o.value) & mask);
  }
  if (const int slot = names.special(o.text); slot >= 0) return slot;
  fail("unknown name " + o.text);
}

int Decoder::target_slot(const Operand& o, Type t, bool wider) {
  if (o.kind == Operand::vector && o.parts.size() == 1) return target_slot(o.parts[0], t, wider);
  if (o.kind == Operand::name && o.text == "_") return names.row();
  if (o.kind != Operand::name || !names.find(o.text)) fail("the destination is no register");
  return slot_of(o, t, wider);
}

int Decoder::source(Type t) { return slot_of(take(), t); }
int Decoder::source_at_least(Type t) { return slot_of(take(), t, true); }
int Decoder::destination(Type t) { return target_slot(take(), t, false); }
int Decoder::destination_at_least(Type t) { return target_slot(take(), t, true); }

std::vector<int> Decoder::sources(Type t, int count) {
  const Operand o = take();
  if (count == 1 && o.kind != Operand::vector) return {slot_of(o, t)};
  if (o.kind != Operand::vector || static_cast<int>(o.parts.size()) != count)
    fail("wanted a vector of " + std::to_string(count));
  std::vector<int> slots;
  for (const Operand& part : o.parts) slots.push_back(slot_of(part, t, true));
  return slots;
}

std::vector<int> Decoder::destinations(Type t, int count, bool wider) {
  const Operand o = take();
  if (count == 1 && o.kind != Operand::vector) return {target_slot(o, t, wider)};
  if (o.kind != Operand::vector || static_cast<int>(o.parts.size()) != count)
    fail("wanted a vector of " + std::to_string(count));
  std::vector<int> slots;
  for (const Operand& part : o.parts) slots.push_back(target_slot(part, t, wider));
  return slots;
}

Predicate Decoder::predicate() {
  Operand o = take();
  const bool negated = std::exchange(o.negated, false);
  return {slot_of(o, kPredicate), negated};
}

std::pair<int, int> Decoder::predicate_pair() { return value_and_predicate(kPredicate); }

std::pair<int, int> Decoder::value_and_predicate(Type t) {
  Operand o = take();
  const std::vector<Operand> second = std::exchange(o.parts, {});
  const int value = target_slot(o, t, false);
  return {value, second.empty() ? names.row() : target_slot(second[0], kPredicate, false)};
}

Address Decoder::address() {
  const Operand o = take();
  if (o.kind != Operand::memory) fail("wanted an address in brackets");
  if (o.text.empty()) return {names.literal(o.value), 0, false};
  if (const Register* r = names.find(o.text)) {
    if (r->width != 32 && r->width != 64) fail("an address of " + std::to_string(r->width) + " bits");
    return {r->slot, o.value, r->width == 32};
  }
  Operand base = o;
  base.kind = Operand::name;
  return {slot_of(base, kB64), 0, false};
}

uint64_t Decoder::immediate() {
  const Operand o = take();
  if (o.kind != Operand::integer) fail("wanted an integer literal");
  return o.value;
}

std::string Decoder::label() {
  const Operand o = take();
  if (o.kind != Operand::name) fail("wanted a label");
  return o.text;
}

void Decoder::finish() const {
  for (size_t i = 0; i < modifiers_.size(); ++i)
    if (!used_[i]) fail("unknown modifier ." + std::string(modifiers_[i]));
  if (more()) fail("too many operands");
}

void decode(Names& names, Instruction& instruction, std::vector<Operand> operands) {
  static const Table kTable = [] {
    Table t;
    for (auto add : {add_integer, add_floating, add_compare, add_convert, add_data, add_warp, add_matrix})
      add(t);
    return t;
  }();
  Decoder d(names, instruction, std::move(operands));
  const auto it = kTable.find(instruction.opcode.substr(0, instruction.opcode.find('.')));
  if (it == kTable.end()) d.fail("unknown instruction");
  it->second(d);
  d.finish();
}

}  // namespace lissom::ptx
