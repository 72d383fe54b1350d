// PTX text to syntax tree in one pass over the characters: PTX has a keyword or a punctuation mark wherever there is a
// choice, so nothing is read twice. Sections 4, 5 and 11 of the PTX ISA.
#include <unordered_map>

#include "declarations.h"

namespace gpuless::ptx {
namespace {

class Parser : public Declarations {
 public:
  Parser(const char* begin, const char* end) : Declarations(begin, end) {
    module_.files.emplace_back();
    module_.locations.emplace_back();
  }

  Module parse() {
    while (skip(), cursor_ != end_) statement_of_module();
    if (last_file_ >= module_.files.size())
      throw SyntaxError{last_file_line_, "no .file has the number " + std::to_string(last_file_)};
    return std::move(module_);
  }

 private:
  // ---- scopes ----

  struct Register {
    int id, elements;  // of a vector, whose elements have the ids that follow; 1: it is none
  };
  struct Registers {  // %r<100>
    std::string_view name;
    Register first;
    uint64_t count;
  };
  struct Fixup {  // of the function's body; the operand is a label or a list of labels, known when the scope ends
    size_t statement, operand;
    int line;
  };
  struct Scope {
    std::vector<Registers> ranges;
    std::unordered_map<std::string_view, Register> registers;
    std::unordered_map<std::string_view, int> labels;
    std::unordered_map<std::string_view, std::string> variables;  // the unique name
    std::unordered_map<std::string_view, std::vector<std::string_view>> label_lists;
    std::vector<Fixup> fixups;
  };

  Register find_register(std::string_view name) const {
    for (size_t s = scopes_.size(); s-- > 0;) {
      for (const Registers& r : scopes_[s].ranges) {
        if (name.size() <= r.name.size() || name.compare(0, r.name.size(), r.name) != 0) continue;
        uint64_t n = 0;
        const char *from = name.data() + r.name.size(), *to = name.data() + name.size();
        const auto [end, error] = std::from_chars(from, to, n);
        if (end == to && error == std::errc() && n < r.count && (*from != '0' || to - from == 1))
          return {r.first.id + static_cast<int>(n) * r.first.elements, r.first.elements};
      }
      const auto entry = scopes_[s].registers.find(name);
      if (entry != scopes_[s].registers.end()) return entry->second;
    }
    return {-1, 0};
  }
  const std::string* find_variable(std::string_view name) const {
    for (size_t s = scopes_.size(); s-- > 0;) {
      const auto entry = scopes_[s].variables.find(name);
      if (entry != scopes_[s].variables.end()) return &entry->second;
    }
    return nullptr;
  }

  // At the end of a scope: resolves its labels. Other names are left to the surrounding scope, or to the module.
  void resolve(Scope& scope) {
    for (const Fixup& f : scope.fixups) {
      Operand& o = function_->body[f.statement].operands[f.operand];
      const auto list = scope.label_lists.find(o.name);
      if (list != scope.label_lists.end()) {
        o = Operand();
        o.kind = Operand::Kind::vector;
        for (std::string_view name : list->second) {
          o.parts.emplace_back();
          o.parts.back().kind = Operand::Kind::symbol;
          o.parts.back().name = name;
          const auto label = scope.labels.find(name);
          if (label == scope.labels.end()) unknown(name, f.line);
          o.parts.back().id = label->second;
        }
        continue;
      }
      const auto label = scope.labels.find(o.name);
      if (label != scope.labels.end())
        o.id = label->second;
      else if (scopes_.size() > 1)
        scopes_[scopes_.size() - 2].fixups.push_back(f);
      else
        unknown(o.name, f.line);
    }
  }

  // ---- operands ----

  Operand operand() {
    Operand o = single();
    if (o.kind == Operand::Kind::symbol && (peek('+') || peek('-'))) o.offset = displacement();
    if (o.kind != Operand::Kind::integer && accept('|')) {
      Operand pair;
      pair.kind = Operand::Kind::pair;
      pair.parts.push_back(std::move(o));
      pair.parts.push_back(single());
      return pair;
    }
    return o;
  }
  Operand single() {
    const Nesting nesting(*this);
    Operand o;
    skip();
    if (*cursor_ == '{') {
      o.kind = Operand::Kind::vector;
      list('{', '}', [&] { o.parts.push_back(operand()); });
    } else if (*cursor_ == '[') {
      o.kind = Operand::Kind::address;
      list('[', ']', [&] {
        o.parts.push_back(o.parts.empty() ? single() : operand());
        if (o.parts.size() == 1 && (peek('+') || peek('-'))) o.offset = displacement();
      });
      if (o.parts.empty()) fail("an empty address");
    } else if (accept('!')) {
      o = single();
      o.negated = true;
      if (o.kind != Operand::Kind::reg) fail("'!' takes a predicate register");
    } else if (begins_number()) {
      const Number n = expression();
      o.kind = n.kind;
      o.bits = n.bits;
    } else {
      return name();
    }
    return o;
  }
  static Operand nth(const Register& r, int i) {
    Operand o;
    o.kind = Operand::Kind::reg;
    o.id = r.id + i;
    return o;
  }
  int element(const Register& r) {
    const std::string_view name = directive();
    if (r.elements == 1) fail("." + std::string(name) + " of a register that is no vector");
    for (const std::string_view names : {"xyzw", "rgba"})
      if (const size_t i = names.find(name); name.size() == 1 && i < static_cast<size_t>(r.elements))
        return static_cast<int>(i);
    fail("a vector of " + std::to_string(r.elements) + " has no element ." + std::string(name));
  }
  Operand name() {
    Operand o;
    const std::string_view text = identifier();
    if (text == "_") return o;
    if (const Register r = find_register(text); r.id >= 0) {
      if (*cursor_ == '.') return nth(r, element(r));
      if (r.elements == 1) return nth(r, 0);
      o.kind = Operand::Kind::vector;  // V is {V.x, V.y}
      for (int i = 0; i < r.elements; ++i) o.parts.push_back(nth(r, i));
    } else if (text[0] == '%') {
      o.kind = Operand::Kind::special;
      o.name = text;
      if (*cursor_ == '.') o.name += '.', o.name += directive();
    } else {
      o.kind = Operand::Kind::symbol;
      const std::string* unique = find_variable(text);
      o.name = unique ? *unique : std::string(text);
      unresolved_ |= !unique && !globals_.count(text);
    }
    return o;
  }

  // ---- statements ----

  void location() {
    const bool inlined_assembly = inline_;  // behind the directive stands the end of it
    Location l;
    l.file = named_file();
    l.line = count();
    const auto key = [](const Location& x, uint64_t column) {
      return static_cast<uint64_t>(x.file) << 48 ^ static_cast<uint64_t>(x.line) << 16 ^ column;
    };
    const uint64_t here = key(l, count());
    while (accept(',')) {
      const std::string_view what = identifier();
      if (what == "function_name") {
        identifier();
        if (peek('+')) displacement();
      } else if (what == "inlined_at") {
        Location outer;
        outer.file = named_file();
        outer.line = count();
        const auto entry = latest_.find(key(outer, count()));
        if (entry != latest_.end()) {
          l.inlined_at = entry->second;
        } else {
          module_.locations.push_back(outer);
          l.inlined_at = static_cast<int>(module_.locations.size() - 1);
        }
      } else {
        fail("expected function_name or inlined_at");
      }
    }
    // The previous location stays for line 0, which is the compiler's own code, and in inline assembly, where LLVM from
    // Triton 3.9 on counts up from the line of the assembly for each line in it.
    if (l.line == 0 || inlined_assembly) return;
    location_ = static_cast<int>(module_.locations.size());
    module_.locations.push_back(l);
    latest_[here] = location_;
  }

  // A file that must be declared by the end of the module: .file may come after the .loc that names it.
  unsigned named_file() {
    const unsigned file = count();
    if (file > last_file_) last_file_ = file, last_file_line_ = line_;
    return file;
  }

  void body() {
    const Nesting nesting(*this);
    expect('{');
    scopes_.emplace_back();
    while (!accept('}')) {
      if (cursor_ == end_) fail("a body without end");
      if (*cursor_ == '{')
        body();
      else if (*cursor_ == '.')
        directive_of_body();
      else if (*cursor_ != ';')
        statement();
      else
        ++cursor_;
    }
    resolve(scopes_.back());
    scopes_.pop_back();
  }

  void directive_of_body() {
    const char* from = cursor_;
    const std::string_view what = directive();
    if (what == "reg") {
      registers();
    } else if (what == "loc") {
      location();
    } else if (what == "pragma") {
      pragma();
    } else {
      cursor_ = from;
      variables(false, [&](Variable&& v, std::string_view name) { declare(std::move(v), name); });
    }
  }

  void declare(Variable&& v, std::string_view name) {
    const int times = ++names_[name];
    if (times > 1) v.name += '#' + std::to_string(times);  // another scope has one of this name
    if (!scopes_.back().variables.emplace(name, v.name).second) fail("declared twice: " + std::string(name));
    if (v.space == Space::shared) claim(shared_, v.bytes, v.alignment, kMostShared, "shared memory");
    if (v.space == Space::local) claim(local_, v.bytes, v.alignment, kMostLocal, "a thread's local memory");
    if (v.space == Space::param) claim_parameter(v);
    function_->variables.push_back(std::move(v));
  }

  void claim_parameter(const Variable& v) {
    claim(parameters_, v.bytes, v.alignment, kMostParameters, "parameters of a function and of its calls");
  }

  void registers() {
    std::string_view what = directive();
    const int elements = what == "v2" || what == "v4" ? what[1] - '0' : 1;
    if (elements > 1) what = directive();
    const Type type = type_of(what);
    if (type == Type::none) fail("expected the type of a register");
    if (elements > 1 && (type == Type::pred || size_of(type) * elements > 16))
      fail("a vector register has up to 128 bits, and no predicates");
    do {
      const std::string_view name = identifier();
      const int first = static_cast<int>(function_->registers.size());
      uint64_t n = 0;
      if (accept('<')) {
        n = count();
        expect('>');
        scopes_.back().ranges.push_back({name, {first, elements}, n});
      } else if (!scopes_.back().registers.emplace(name, Register{first, elements}).second) {
        fail("a register declared twice");
      } else {
        n = 1;
      }
      if (static_cast<int64_t>(first + n * elements) > kMostRegisters)
        fail("a function may have " + std::to_string(kMostRegisters) + " registers");
      function_->registers.resize(first + n * elements, type);
    } while (accept(','));
    expect(';');
  }

  void statement() {
    Statement s;
    s.line = line_;
    s.location = location_;
    if (accept('@')) {
      s.guard_negated = accept('!');
      s.guard = find_register(identifier()).id;
      if (s.guard < 0 || function_->registers[s.guard] != Type::pred) fail("the guard is no predicate register");
      skip();
      s.line = line_;
    }
    const std::string_view first = identifier();
    if (peek(':') && cursor_[1] != ':') {
      ++cursor_;
      if (s.guard >= 0) fail("a label with a guard");
      return label(first);
    }
    s.opcode = first;
    while (*cursor_ == '.') {  // modifiers, ".shared::cta"
      ++cursor_;
      const char* from = cursor_;
      while (is(*cursor_, kContinues) || (cursor_[0] == ':' && cursor_[1] == ':' && ++cursor_)) ++cursor_;
      (s.opcode += '.').append(from, cursor_ - from);
      skip();
    }
    if (first == "call") return call(std::move(s));
    if (!peek(';')) {
      do argument(s, operand());
      while (accept(','));
    }
    expect(';');
    function_->body.push_back(std::move(s));
  }

  // A name that is not known yet may be a label further down.
  void argument(Statement& s, Operand&& o) {
    if (unresolved_) {
      if (o.kind != Operand::Kind::symbol) unknown(unresolved_name(o), line_);
      scopes_.back().fixups.push_back({function_->body.size(), s.operands.size(), line_});
      unresolved_ = false;
    }
    s.operands.push_back(std::move(o));
  }
  static std::string unresolved_name(const Operand& o) {
    if (o.kind == Operand::Kind::symbol) return o.name;
    std::string names;
    for (const Operand& part : o.parts) names += (names.empty() ? "" : " ") + unresolved_name(part);
    return names;
  }

  // call (ret), f, (a, b), prototype: the lists are vectors, and there whether written or not.
  void call(Statement&& s) {
    const auto arguments = [&] {
      Operand o;
      o.kind = Operand::Kind::vector;
      if (peek('(')) list('(', ')', [&] { o.parts.push_back(operand()); });
      return o;
    };
    const bool returns = peek('(');
    argument(s, arguments());
    if (returns) expect(',');
    argument(s, name());
    const bool parameters = accept(',') && peek('(');
    argument(s, arguments());
    if (parameters ? accept(',') : !peek(';')) argument(s, name());
    expect(';');
    function_->body.push_back(std::move(s));
  }

  void label(std::string_view name) {
    Scope& scope = scopes_.back();
    if (peek('.')) {
      const char* dot = cursor_;
      const std::string_view what = directive();
      if (what == "branchtargets") {
        auto& names = scope.label_lists[name];
        do names.push_back(identifier());
        while (accept(','));
        return expect(';');
      }
      if (what == "callprototype" || what == "calltargets") {  // nothing that the call's own variables do not say
        while (skip(), *cursor_ != ';' && cursor_ != end_) ++cursor_;
        scope.variables.emplace(name, name);
        return expect(';');
      }
      cursor_ = dot;
    }
    if (!scope.labels.emplace(name, static_cast<int>(function_->body.size())).second)
      fail("a label twice in one scope");
  }

  // ---- the module ----

  void statement_of_module() {
    const char* from = cursor_;
    if (accept(';')) return;
    std::string_view what = directive();
    bool is_extern = false;
    while (what == "visible" || what == "extern" || what == "weak" || what == "common") {
      is_extern |= what == "extern";
      skip();
      from = cursor_;
      what = directive();
    }
    if (what == "entry" || what == "func") {
      function(what == "entry");
    } else if (what == "version") {
      skip();
      const char* begin = cursor_;
      while (is(*cursor_, kContinues) || *cursor_ == '.') ++cursor_;
      module_.version.assign(begin, cursor_);
    } else if (what == "target") {
      module_.target = identifier();
      while (accept(',')) identifier();
    } else if (what == "address_size") {
      if (peek('6') && cursor_[1] == '4')
        cursor_ += 2;
      else
        fail("only 64-bit addresses are supported");
    } else if (what == "file") {
      const size_t index = count();
      if (index > 1'000'000) fail("a file index beyond all measure");
      std::string name(quoted());
      if (peek('"')) name += '/' + std::string(quoted());
      while (accept(',')) count();  // time and size
      if (module_.files.size() <= index) module_.files.resize(index + 1);
      module_.files[index] = name;
    } else if (what == "section") {
      while (skip(), *cursor_ != '{' && cursor_ != end_) ++cursor_;
      expect('{');
      while (skip(), *cursor_ != '}' && cursor_ != end_) ++cursor_;
      expect('}');
    } else if (what == "pragma") {
      pragma();
    } else {
      cursor_ = from;
      variables(is_extern, [&](Variable&& v, std::string_view name) {
        globals_.insert(name);
        const bool shared = v.space == Space::shared;
        if (shared) claim(module_shared_, v.bytes, v.alignment, kMostShared, "shared memory");
        if (!shared && !v.is_extern) claim(global_, v.bytes, v.alignment, kMostGlobal, "a module's variables");
        module_.variables.push_back(std::move(v));
      });
    }
  }

  void pragma() {
    do quoted();
    while (accept(','));
    expect(';');
  }

  void function(bool entry) {
    Function f;
    f.entry = entry;
    f.line = line_;
    function_ = &f;
    location_ = 0;
    shared_ = local_ = parameters_ = 0;
    names_.clear();
    scopes_.clear();
    scopes_.emplace_back();
    const auto parameters = [&](std::vector<Variable>& to) {
      list('(', ')', [&] {
        std::string_view name;
        to.push_back(variable(&name));
        if (to.back().space != Space::param) fail("only .param parameters are supported");
        claim_parameter(to.back());
        if (entry && parameters_ > kMostKernelParameters)
          fail("a kernel may have parameters of " + std::to_string(kMostKernelParameters) + " bytes");
        scopes_.back().variables.emplace(name, name);
        ++names_[name];
      });
    };
    if (peek('(')) parameters(f.returns);
    const std::string_view name = identifier();
    f.name = name;
    globals_.insert(name);
    if (peek('(')) parameters(f.parameters);
    while (peek('.')) directive_of_function(f);
    f.declared_only = accept(';');
    if (!f.declared_only) {
      body();
      resolve(scopes_.back());
      f.body.emplace_back();  // for those that run off the end
      f.body.back().opcode = "ret";
      f.body.back().line = line_;
      f.body.back().location = location_;
    }
    const auto [index, first] = functions_.emplace(name, module_.functions.size());
    if (first)
      module_.functions.push_back(std::move(f));
    else if (!f.declared_only && module_.functions[index->second].declared_only)
      module_.functions[index->second] = std::move(f);
    else if (!f.declared_only)
      fail("defined twice: " + f.name);
  }

  void directive_of_function(Function& f) {
    const char* from = cursor_;
    const std::string_view what = directive();
    const auto triple = [&](unsigned to[3], unsigned limit) {
      to[1] = to[2] = 1;
      int n = 0;
      unsigned product = 1;
      do {
        if (n == 3) fail("more than three dimensions");
        to[n] = count();
        if (to[n] == 0 || to[n] > limit / product)
          fail("dimensions whose product is not 1 to " + std::to_string(limit));
        product *= to[n++];
      } while (accept(','));
    };
    if (what == "maxntid")
      triple(f.max_threads, kMostThreads);
    else if (what == "reqntid")
      triple(f.required_threads, kMostThreads);
    else if (what == "reqnctapercluster")
      triple(f.cluster, kMostCtas);
    else if (what == "minnctapersm")
      f.min_ctas = count();
    else if (what == "maxnctapersm")
      count();
    else if (what == "maxnreg")
      f.max_registers = count();
    else if (what == "maxclusterrank")
      f.max_cluster_rank = count();
    else if (what == "explicitcluster")
      f.explicit_cluster = true;
    else if (what == "abi_preserve" || what == "abi_preserve_control")
      count();
    else if (what == "pragma")
      pragma();
    else if (what != "noreturn" && what != "noinline" && what != "unique_frame")
      cursor_ = from, fail("an unknown directive");
  }

  Module module_;
  std::unordered_map<std::string_view, size_t> functions_;  // their indices
  std::unordered_map<uint64_t, int> latest_;                // locations by file, line and column

  unsigned last_file_ = 0;  // of those that are named
  int last_file_line_ = 0;
  int64_t shared_ = 0, local_ = 0, parameters_ = 0;  // bytes so far, of the function
  int64_t module_shared_ = 0, global_ = 0;           // and of the module

  Function* function_ = nullptr;
  int location_ = 0;
  bool unresolved_ = false;                          // the operand just read has an unknown name
  std::vector<Scope> scopes_;                        // the function's parameters, its body, blocks within
  std::unordered_map<std::string_view, int> names_;  // how many variables of the function are called so
};

}  // namespace

Module parse(std::string_view text) {
  while (!text.empty() && text.back() == '\0') text.remove_suffix(1);  // of a fat binary
  const std::string copy(text);                                        // for the zero that ends it
  return Parser(copy.data(), copy.data() + copy.size()).parse();
}

}  // namespace gpuless::ptx