// SPDX-License-Identifier: Apache-2.0
// PTX text to a Module. The whole file is read: an unknown directive or instruction anywhere is an error, run or not.
#include <cstdlib>
#include <cstring>
#include <set>

#include "decode.h"

namespace lissom::ptx {
namespace {

struct Token {
  std::string_view text;
  int line;
  bool is(std::string_view s) const { return text == s; }
};

bool word_character(char c) {
  return isalnum(static_cast<unsigned char>(c)) || c == '_' || c == '$' || c == '%' || c == '.';
}

std::vector<Token> tokens_of(const std::string& text) {
  std::vector<Token> tokens;
  int line = 1;
  size_t i = 0;
  const auto skip_to = [&](const char* end) {
    const size_t stop = std::min(text.find(end, i), text.size());
    for (; i < stop; ++i) line += text[i] == '\n';
  };
  while (i < text.size()) {
    const char c = text[i];
    if (c == '\n') ++line;
    if (isspace(static_cast<unsigned char>(c))) {
      ++i;
    } else if (text.compare(i, 2, "//") == 0) {
      skip_to("\n");
    } else if (text.compare(i, 2, "/*") == 0) {
      skip_to("*/");
      i += 2;
    } else if (c == '"') {
      const size_t end = std::min(text.find('"', i + 1), text.size() - 1);
      tokens.push_back({std::string_view(text).substr(i, end + 1 - i), line});
      i = end + 1;
    } else if (word_character(c)) {
      size_t end = i;
      while (end < text.size() && (word_character(text[end]) || text.compare(end, 2, "::") == 0))
        end += text[end] == ':' ? 2 : 1;
      tokens.push_back({std::string_view(text).substr(i, end - i), line});
      i = end;
    } else {
      tokens.push_back({std::string_view(text).substr(i, 1), line});
      ++i;
    }
  }
  return tokens;
}

class Parser {
 public:
  explicit Parser(Module& module) : module_(module), tokens_(tokens_of(module.text)) {}
  void run() {
    while (!done()) top_level();
    if (module_.kernels.empty()) fault("no kernel in this PTX");
  }

 private:
  bool done() const { return at_ >= tokens_.size(); }
  const Token& peek(size_t ahead = 0) const {
    if (at_ + ahead >= tokens_.size()) fault("the PTX ends too early");
    return tokens_[at_ + ahead];
  }
  Token take() {
    const Token t = peek();
    ++at_;
    return t;
  }
  bool accept(std::string_view s) {
    if (done() || !peek().is(s)) return false;
    ++at_;
    return true;
  }
  void expect(std::string_view s) {
    if (!accept(s)) fail("wanted " + std::string(s) + ", found " + std::string(peek().text));
  }
  [[noreturn]] void fail(const std::string& why) const {
    fault("line %d: %s", at_ < tokens_.size() ? tokens_[at_].line : 0, why.c_str());
  }
  void skip_line() {
    for (const int line = peek().line; !done() && peek().line == line;) ++at_;
  }
  void skip_braces() {
    expect("{");
    for (int depth = 1; depth > 0;) {
      const Token t = take();
      depth += t.is("{") - t.is("}");
    }
  }

  uint64_t integer() {
    const bool negative = accept("-");
    std::string s(take().text);
    if (!s.empty() && s.back() == 'U') s.pop_back();
    const bool binary = s.rfind("0b", 0) == 0;
    char* end;
    const uint64_t v = std::strtoull(s.c_str() + (binary ? 2 : 0), &end, binary ? 2 : 0);
    if (*end || s.empty()) fail("wanted an integer, found " + s);
    return negative ? ~v + 1 : v;
  }

  Operand literal() {
    Operand o;
    const std::string_view s = peek(peek().is("-") ? 1 : 0).text;
    if (s.size() == 10 && (s.substr(0, 2) == "0f" || s.substr(0, 2) == "0F")) {
      o.kind = Operand::real;
      o.real_bits = 32;
      o.value = std::strtoull(std::string(take().text.substr(2)).c_str(), nullptr, 16);
    } else if (s.size() == 18 && (s.substr(0, 2) == "0d" || s.substr(0, 2) == "0D")) {
      o.kind = Operand::real;
      o.real_bits = 64;
      o.value = std::strtoull(std::string(take().text.substr(2)).c_str(), nullptr, 16);
    } else if (s.find('.') != std::string_view::npos) {
      const bool negative = accept("-");
      o.kind = Operand::real;
      o.real_bits = 64;
      char* end;
      const std::string text(take().text);
      const double x = std::strtod(text.c_str(), &end);
      if (*end) fail("wanted a number, found " + text);
      o.value = bits_of(negative ? -x : x);
    } else {
      o.kind = Operand::integer;
      o.value = integer();
    }
    return o;
  }

  uint64_t offset() {  // behind a name
    if (accept("+")) return integer();
    return peek().is("-") ? integer() : 0;
  }

  Operand operand() {
    Operand o;
    o.negated = accept("!");
    const char c = peek().text[0];
    if (accept("[")) {
      o.kind = Operand::memory;
      const bool numeric = isdigit(static_cast<unsigned char>(peek().text[0])) || peek().is("-");
      if (!numeric) o.text = take().text;
      o.value = numeric ? integer() : offset();
      expect("]");
    } else if (accept("{")) {
      o.kind = Operand::vector;
      do o.parts.push_back(operand());
      while (accept(","));
      expect("}");
    } else if (isdigit(static_cast<unsigned char>(c)) || c == '-') {
      return literal();
    } else {
      o.text = take().text;
      o.value = offset();
      if (accept("|")) o.parts.push_back(operand());
    }
    return o;
  }

  // --- variables and registers ---

  // .space [.align n] [.ptr [.space] [.align n]] .type name [ '[' n ']' ] [ = { ... } ]
  Variable variable(Space space, std::vector<uint64_t>* initial = nullptr) {
    Variable v{"", space, 0, 0, 0};
    uint64_t element = 0;
    for (;;) {
      const Token t = take();
      if (t.is(".align")) {
        v.align = std::max(v.align, integer());
      } else if (t.is(".ptr")) {
        while (peek().is(".global") || peek().is(".shared") || peek().is(".const") || peek().is(".local"))
          take();
        if (accept(".align")) integer();  // of what it points to
      } else if (t.text[0] == '.') {
        const auto type = type_named(t.text.substr(1));
        if (!type) fail("unknown type or directive " + std::string(t.text));
        element = type->bytes();
      } else {
        v.name = t.text;
        break;
      }
    }
    if (!element) fail("variable without type: " + v.name);
    uint64_t count = 1;
    if (accept("[")) {
      count = peek().is("]") ? 0 : integer();
      expect("]");
    }
    v.bytes = count * element;
    v.align = std::max(v.align, element);
    if (accept("=")) {
      if (!initial) fail("an initial value here");
      const bool list = accept("{");
      do {
        const Operand o = operand();
        if (o.kind != Operand::integer && o.kind != Operand::real)
          fail("an address as initial value is not supported");
        for (uint64_t i = 0; i < element; ++i) initial->push_back(o.value >> (8 * i) & 0xff);
      } while (list && accept(","));
      if (list) expect("}");
    }
    return v;
  }

  void place(Variable& v, uint64_t& end) {
    v.offset = (end + v.align - 1) / v.align * v.align;
    end = v.offset + v.bytes;
  }

  void module_variable(Space space) {
    std::vector<uint64_t> initial;
    Variable v = variable(space, &initial);
    expect(";");
    if (space == Space::shared) {
      module_shared_.push_back(v);
      return;
    }
    if (v.bytes == 0) fail("variable without size: " + v.name);
    auto& g = module_.globals[v.name];
    g.storage.resize((v.bytes + v.align) / 8 + 1);
    const auto raw = reinterpret_cast<uint64_t>(g.storage.data());
    v.offset = (raw + v.align - 1) / v.align * v.align;
    g.data = reinterpret_cast<uint8_t*>(v.offset);
    g.bytes = v.bytes;
    g.space = space;
    if (initial.size() > v.bytes) fail("too many initial values: " + v.name);
    for (size_t i = 0; i < initial.size(); ++i) g.data[i] = static_cast<uint8_t>(initial[i]);
    module_variables_[v.name] = v;
  }

  void registers(Names& names) {
    const auto type = type_named(take().text.substr(1));
    if (!type) fail("unknown register type");
    do {
      const std::string name(take().text);
      uint64_t count = 1;
      const bool many = accept("<");
      if (many) {
        count = integer();
        expect(">");
      }
      for (uint64_t i = 0; i < count; ++i)
        if (!names.scopes.back()
                 .try_emplace(many ? name + std::to_string(i) : name, Register{names.row(), type->total()})
                 .second)
          fail("register declared twice: " + name);
    } while (accept(","));
    expect(";");
  }

  // --- top level ---

  void top_level() {
    const Token t = take();
    static const std::set<std::string_view> kLinkage = {".visible", ".extern", ".weak", ".common"};
    if (kLinkage.contains(t.text)) return;
    if (t.is(".version") || t.is(".address_size") || t.is(".file") || t.is(".target")) {
      if (t.is(".target")) module_.target = peek().text;
      skip_line();
    } else if (t.is(".section")) {
      take();
      skip_braces();
    } else if (t.is(".pragma")) {
      while (!accept(";")) take();
    } else if (t.is(".global")) {
      module_variable(Space::global);
    } else if (t.is(".const")) {
      module_variable(Space::constant);
    } else if (t.is(".shared")) {
      module_variable(Space::shared);
    } else if (t.is(".entry")) {
      entry();
    } else if (t.is(".func")) {
      fail(".func: calls of device functions are not supported; make the function inline");
    } else {
      fail("unknown directive " + std::string(t.text));
    }
  }

  Dim dimensions() {
    Dim d;
    d.x = static_cast<uint32_t>(integer());
    if (accept(",")) d.y = static_cast<uint32_t>(integer());
    if (accept(",")) d.z = static_cast<uint32_t>(integer());
    return d;
  }

  void entry() {
    const std::string name(take().text);
    Kernel& k = module_.kernels[name];
    k.name = name;
    Names names{module_, k, {{}}, {}, {}, {}, {}, {}};
    for (const auto& [n, v] : module_variables_) names.variables.emplace(n, v);
    for (Variable v : module_shared_) declare_shared(names, v);
    if (accept("(")) {
      while (!accept(")")) {
        expect(".param");
        Variable v = variable(Space::param);
        place(v, k.param_bytes);
        k.params.push_back(v);
        names.variables[v.name] = v;
        accept(",");
      }
    }
    for (; !peek().is("{");) {
      const Token t = take();
      if (t.is(".maxntid"))
        k.max_threads = dimensions();
      else if (t.is(".reqntid"))
        k.required_threads = dimensions();
      else if (t.is(".minnctapersm") || t.is(".maxnreg"))
        integer();
      else
        fail("unknown directive " + std::string(t.text));
    }
    body(names);
    for (const auto& [label, id] : names.labels)
      if (k.labels[id] < 0) fault("kernel %s: no label %s", name.c_str(), label.c_str());
    resolve_tables(names);
    Instruction end;
    end.flow = Instruction::Flow::exit;
    end.text = end.opcode = "ret";
    end.op = [](Warp&) {};
    k.code.push_back(end);  // falling off the end
    k.static_shared = std::max<uint64_t>(k.static_shared, kSharedBase) - kSharedBase;
  }

  void declare_shared(Names& names, Variable v) {
    Kernel& k = names.kernel;
    if (v.bytes == 0) {
      k.dynamic_align = std::max(k.dynamic_align, v.align);
    } else {
      k.static_shared = std::max<uint64_t>(k.static_shared, kSharedBase);
      place(v, k.static_shared);
    }
    names.variables[v.name] = v;
  }

  // --- body of a kernel ---

  void body(Names& names) {
    expect("{");
    for (int depth = 1; depth > 0;) {
      const Token& t = peek();
      if (accept("{")) {
        names.scopes.emplace_back();
        ++depth;
      } else if (accept("}")) {
        names.scopes.pop_back();
        --depth;
      } else if (t.text[0] == '.' && !t.is(".")) {
        directive(names);
      } else if (peek(1).is(":")) {
        label(names);
      } else {
        statement(names);
      }
    }
  }

  void label(Names& names) {
    const std::string name(take().text);
    expect(":");
    if (accept(".branchtargets")) {
      do names.tables[name].push_back(names.label(std::string(take().text)));
      while (accept(","));
      expect(";");
      return;
    }
    int& at = names.kernel.labels[names.label(name)];
    if (at >= 0) fail("label used twice: " + name);
    at = static_cast<int>(names.kernel.code.size());
  }

  void directive(Names& names) {
    const Token t = take();
    if (t.is(".reg")) {
      registers(names);
    } else if (t.is(".shared")) {
      declare_shared(names, variable(Space::shared));
      expect(";");
    } else if (t.is(".local")) {
      Variable v = variable(Space::local);
      uint64_t end = std::max(names.kernel.local_bytes, kLocalBase);
      place(v, end);
      names.kernel.local_bytes = end;
      names.variables[v.name] = v;
      expect(";");
    } else if (t.is(".loc")) {
      skip_line();
    } else if (t.is(".pragma")) {
      while (!accept(";")) take();
    } else {
      fail("unknown directive " + std::string(t.text));
    }
  }

  void statement(Names& names) {
    Instruction in;
    in.line = peek().line;
    const char* begin = peek().text.data();
    if (accept("@")) {
      in.negated = accept("!");
      const Register* p = names.find(take().text);
      if (!p || p->width != 1) fail("the guard is no predicate");
      in.guard = p->slot;
    }
    in.opcode = take().text;
    std::vector<Operand> operands;
    if (!peek().is(";")) {
      do operands.push_back(operand());
      while (accept(","));
    }
    const Token end = peek();
    expect(";");
    in.text = std::string_view(begin, static_cast<size_t>(end.text.data() - begin));
    decode(names, in, std::move(operands));
    names.kernel.code.push_back(std::move(in));
  }

  // brx.idx may stand before its .branchtargets.
  void resolve_tables(Names& names) {
    for (Instruction& in : names.kernel.code) {
      if (in.flow != Instruction::Flow::table) continue;
      const std::string name(in.text.substr(in.text.find_last_of(", \t") + 1));
      const auto it = names.tables.find(name);
      if (it == names.tables.end()) fault("line %d: no .branchtargets %s", in.line, name.c_str());
      in.targets = it->second;
    }
  }

  Module& module_;
  std::vector<Token> tokens_;
  size_t at_ = 0;
  std::vector<Variable> module_shared_;
  std::map<std::string, Variable, std::less<>> module_variables_;
};

}  // namespace

std::unique_ptr<Module> parse(std::string text) {
  auto module = std::make_unique<Module>();
  module->text = std::move(text);
  Parser(*module).run();
  return module;
}

}  // namespace lissom::ptx
