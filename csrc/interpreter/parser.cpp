// PTX text to syntax tree in one pass over the characters: PTX has a keyword or a punctuation mark wherever there is a
// choice, so nothing is read twice. Sections 4, 5 and 11 of the PTX ISA.
#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstring>
#include <unordered_map>
#include <unordered_set>

#include "ptx.h"

namespace forwardpass::ptx {
namespace {

struct TypeRow {
  std::string_view name;
  int bytes;
  char group;  // s: signed, f: float, ' ': neither
};
// In the order of Type.
constexpr TypeRow kTypes[] = {
    {"", 0, ' '},     {"pred", 4, ' '},   {"b8", 1, ' '},     {"u8", 1, ' '},     {"s8", 1, 's'},    {"b16", 2, ' '},
    {"u16", 2, ' '},  {"s16", 2, 's'},    {"f16", 2, 'f'},    {"bf16", 2, 'f'},   {"b32", 4, ' '},   {"u32", 4, ' '},
    {"s32", 4, 's'},  {"f32", 4, 'f'},    {"f16x2", 4, 'f'},  {"bf16x2", 4, 'f'}, {"tf32", 4, 'f'},  {"b64", 8, ' '},
    {"u64", 8, ' '},  {"s64", 8, 's'},    {"f64", 8, 'f'},    {"f32x2", 8, 'f'},  {"b128", 16, ' '}, {"e4m3", 1, 'f'},
    {"e5m2", 1, 'f'}, {"e4m3x2", 2, 'f'}, {"e5m2x2", 2, 'f'},
};
static_assert(std::size(kTypes) == static_cast<size_t>(Type::e5m2x2) + 1);
const TypeRow& row_of(Type t) { return kTypes[static_cast<int>(t)]; }

enum : uint8_t { kBegins = 1, kContinues = 2, kBlank = 4 };  // of an identifier; blanks but not the newline
constexpr std::array<uint8_t, 256> classes() {
  std::array<uint8_t, 256> c = {};
  for (int i = 'a'; i <= 'z'; ++i) c[i] = c[i - 32] = kBegins | kContinues;
  for (int i = '0'; i <= '9'; ++i) c[i] = kContinues;
  c['_'] = c['$'] = kBegins | kContinues;
  c['%'] = kBegins;
  c[' '] = c['\t'] = c['\r'] = c['\f'] = c['\v'] = kBlank;
  return c;
}
constexpr std::array<uint8_t, 256> kClass = classes();
bool is(char c, uint8_t what) { return kClass[static_cast<uint8_t>(c)] & what; }

class Parser {
 public:
  // The text must be followed by a zero, which ends every loop below.
  Parser(const char* begin, const char* end) : begin_(begin), at_(begin), end_(end) {
    module_.files.emplace_back();
    module_.locations.emplace_back();
  }

  Module parse() {
    while (skip(), at_ != end_) statement_of_module();
    return std::move(module_);
  }

 private:
  // ---- characters ----

  [[noreturn]] void fail(const std::string& why) const {
    const char *from = at_, *to = at_;
    while (from > begin_ && from[-1] != '\n') --from;
    while (to < end_ && *to != '\n') ++to;
    while (from < to && is(*from, kBlank)) ++from;
    throw SyntaxError{line_, why + ": " + std::string(from, std::min<std::ptrdiff_t>(to - from, 200))};
  }

  void skip() {
    for (;;) {
      if (is(*at_, kBlank)) {
        ++at_;
      } else if (*at_ == '\n') {
        ++at_, ++line_;
      } else if (at_[0] == '/' && at_[1] == '/') {
        while (at_ != end_ && *at_ != '\n') ++at_;
      } else if (at_[0] == '/' && at_[1] == '*') {
        for (at_ += 2; !(at_[0] == '*' && at_[1] == '/'); ++at_) {
          if (at_ == end_) fail("a comment without end");
          line_ += *at_ == '\n';
        }
        at_ += 2;
      } else {
        return;
      }
    }
  }
  bool peek(char c) { return skip(), *at_ == c; }
  bool accept(char c) { return peek(c) && (++at_, true); }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "'");
  }
  std::string_view identifier() {
    skip();
    if (!is(*at_, kBegins)) fail("expected a name");
    const char* from = at_++;
    while (is(*at_, kContinues)) ++at_;
    return {from, static_cast<size_t>(at_ - from)};
  }
  // ".visible" and the like, without the dot; empty if there is none.
  std::string_view directive() {
    if (!accept('.')) return {};
    const char* from = at_;
    while (is(*at_, kContinues)) ++at_;
    return {from, static_cast<size_t>(at_ - from)};
  }
  std::string_view quoted() {
    expect('"');
    const char* from = at_;
    while (*at_ != '"' && *at_ != '\n' && at_ != end_) ++at_;
    std::string_view text(from, at_ - from);
    if (*at_ != '"') fail("a string without end");
    ++at_;
    return text;
  }
  template <class F>
  void list(char open, char close, F item) {
    expect(open);
    if (accept(close)) return;
    do item();
    while (accept(','));
    expect(close);
  }

  // ---- numbers ----

  struct Number {
    Operand::Kind kind = Operand::Kind::integer;
    uint64_t bits = 0;
  };
  bool warp_size() const { return std::strncmp(at_, "WARP_SZ", 7) == 0 && !is(at_[7], kContinues); }
  bool begins_number() {
    skip();
    return (*at_ >= '0' && *at_ <= '9') || *at_ == '-' || *at_ == '~' || *at_ == '(' || warp_size();
  }

  uint64_t digits(int base) {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(at_, end_, value, base);
    if (error != std::errc()) fail("a number that does not fit 64 bits, or has no digits");
    at_ = end;
    return value;
  }
  Number literal() {
    skip();
    if (warp_size()) return at_ += 7, Number{Operand::Kind::integer, 32};
    const char* from = at_;
    Number n;
    const char second = *at_ == '0' ? static_cast<char>(at_[1] | 0x20) : 0;
    if (second == 'f' || second == 'd') {
      at_ += 2;
      n.kind = second == 'f' ? Operand::Kind::f32 : Operand::Kind::f64;
      n.bits = digits(16);
      if (at_ - from != (second == 'f' ? 10 : 18)) fail("a 0f literal has 8 hexadecimal digits, a 0d literal 16");
    } else if (second == 'x' || second == 'b') {
      at_ += 2;
      n.bits = digits(second == 'x' ? 16 : 2);
    } else {
      while (*at_ >= '0' && *at_ <= '9') ++at_;
      if (*at_ == '.' || (*at_ | 0x20) == 'e') {
        n.kind = Operand::Kind::f64;
        double value = 0;
        const auto [end, error] = std::from_chars(from, end_, value);
        if (error != std::errc()) fail("a number that is no double");
        at_ = end;
        std::memcpy(&n.bits, &value, 8);
      } else {
        at_ = from;
        n.bits = digits(*from == '0' ? 8 : 10);
      }
    }
    if (n.kind == Operand::Kind::integer && (*at_ == 'U' || *at_ == 'u')) ++at_;
    if (is(*at_, kBegins | kContinues)) fail("not a number");
    return n;
  }

  Number unary() {
    if (accept('(')) {
      const Number n = expression();
      expect(')');
      return n;
    }
    if (accept('-')) {
      Number n = unary();
      if (n.kind == Operand::Kind::integer)
        n.bits = -n.bits;
      else
        n.bits ^= n.kind == Operand::Kind::f32 ? uint64_t{1} << 31 : uint64_t{1} << 63;
      return n;
    }
    if (accept('~')) return {Operand::Kind::integer, ~integer(unary())};
    return literal();
  }
  uint64_t integer(const Number& n) const {
    if (n.kind != Operand::Kind::integer) fail("expected an integer");
    return n.bits;
  }
  static int precedence(std::string_view op) {
    constexpr std::string_view order[] = {"|", "^", "&", "<<>>", "+-", "*/%"};
    for (int i = 0; i < 6; ++i)
      if (!op.empty() && order[i].find(op) != order[i].npos) return i + 1;
    return 0;
  }
  std::string_view infix() {
    skip();
    if (*at_ == '<' || *at_ == '>') return {at_, at_[1] == *at_ ? size_t{2} : 0};
    return {at_, size_t{std::strchr("|^&+-*/%", *at_) && *at_}};
  }
  // Constant expressions, ISA 4.5.
  Number expression(int least = 1) {
    Number left = unary();
    for (;;) {
      const std::string_view op = infix();
      const int rank = precedence(op);
      if (rank < least || rank == 0) return left;
      at_ += op.size();
      const uint64_t a = integer(left), b = integer(expression(rank + 1));
      // 64 bits, signed or unsigned by rules that no compiler's output needs: refused where the difference would show.
      if ((op == "/" || op == "%" || op == ">>") && (static_cast<int64_t>(a | b) < 0 || (b == 0 && op != ">>")))
        fail("a constant expression with a negative or zero operand of / % or >>");
      if (op.size() == 2 && b > 63) fail("a constant shifted by more than 63");
      switch (op[0]) {
        case '|':
          left.bits = a | b;
          break;
        case '^':
          left.bits = a ^ b;
          break;
        case '&':
          left.bits = a & b;
          break;
        case '<':
          left.bits = a << b;
          break;
        case '>':
          left.bits = a >> b;
          break;
        case '+':
          left.bits = a + b;
          break;
        case '-':
          left.bits = a - b;
          break;
        case '*':
          left.bits = a * b;
          break;
        case '/':
          left.bits = a / b;
          break;
        default:
          left.bits = a % b;
      }
    }
  }
  int64_t constant() { return static_cast<int64_t>(integer(expression())); }
  unsigned count() {
    const int64_t n = constant();
    if (n < 0 || n > INT32_MAX) fail("expected a number between 0 and 2147483647");
    return static_cast<unsigned>(n);
  }

  // ---- scopes ----

  struct Registers {  // %r<100>, or one
    std::string_view name;
    int first;
    uint64_t count;  // 0: one, without a number
  };
  struct Fixup {  // of the function's body; the operand is a label or a list of labels, known when the scope ends
    size_t statement, operand;
    int line;
  };
  struct Scope {
    std::vector<Registers> ranges;
    std::unordered_map<std::string_view, int> registers, labels;
    std::unordered_map<std::string_view, std::string> variables;  // the unique name
    std::unordered_map<std::string_view, std::vector<std::string_view>> label_lists;
    std::vector<Fixup> fixups;
  };

  int find_register(std::string_view name) const {
    for (size_t s = scopes_.size(); s-- > 0;) {
      for (const Registers& r : scopes_[s].ranges) {
        if (name.size() <= r.name.size() || name.compare(0, r.name.size(), r.name) != 0) continue;
        uint64_t n = 0;
        const char *from = name.data() + r.name.size(), *to = name.data() + name.size();
        const auto [end, error] = std::from_chars(from, to, n);
        if (end == to && error == std::errc() && n < r.count && (*from != '0' || to - from == 1))
          return r.first + static_cast<int>(n);
      }
      const auto found = scopes_[s].registers.find(name);
      if (found != scopes_[s].registers.end()) return found->second;
    }
    return -1;
  }
  const std::string* find_variable(std::string_view name) const {
    for (size_t s = scopes_.size(); s-- > 0;) {
      const auto found = scopes_[s].variables.find(name);
      if (found != scopes_[s].variables.end()) return &found->second;
    }
    return nullptr;
  }

  // Labels of the scope that ends get their statements; the rest is the surrounding scope's, or the module's.
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
  [[noreturn]] static void unknown(std::string_view name, int line) {
    throw SyntaxError{line, "nothing of this name has been declared: " + std::string(name)};
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
    Operand o;
    skip();
    if (*at_ == '{') {
      o.kind = Operand::Kind::vector;
      list('{', '}', [&] { o.parts.push_back(operand()); });
    } else if (*at_ == '[') {
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
  int64_t displacement() {
    const bool minus = *at_++ == '-';
    const uint64_t value = integer(expression());
    return static_cast<int64_t>(minus ? -value : value);
  }
  Operand name() {
    Operand o;
    const std::string_view text = identifier();
    if (text == "_") return o;
    o.id = find_register(text);
    if (o.id >= 0) {
      o.kind = Operand::Kind::reg;
      if (*at_ == '.') fail("elements of vector registers are not supported");
    } else if (text[0] == '%') {
      o.kind = Operand::Kind::special;
      o.name = text;
      if (*at_ == '.') o.name += '.', o.name += directive();
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
    Location l;
    l.file = count();
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
        outer.file = count();
        outer.line = count();
        const auto found = latest_.find(key(outer, count()));
        if (found != latest_.end()) {
          l.inlined_at = found->second;
        } else {
          module_.locations.push_back(outer);
          l.inlined_at = static_cast<int>(module_.locations.size() - 1);
        }
      } else {
        fail("expected function_name or inlined_at");
      }
    }
    if (l.line == 0) return;  // the compiler's own: what was said last serves better
    location_ = static_cast<int>(module_.locations.size());
    module_.locations.push_back(l);
    latest_[here] = location_;
  }

  void body() {
    expect('{');
    scopes_.emplace_back();
    while (!accept('}')) {
      if (at_ == end_) fail("a body without end");
      if (*at_ == '{')
        body();
      else if (*at_ == '.')
        directive_of_body();
      else if (*at_ != ';')
        statement();
      else
        ++at_;
    }
    resolve(scopes_.back());
    scopes_.pop_back();
  }

  void directive_of_body() {
    const char* from = at_;
    const std::string_view what = directive();
    if (what == "reg") {
      registers();
    } else if (what == "loc") {
      location();
    } else if (what == "pragma") {
      pragma();
    } else {
      at_ = from;
      variables(false, [&](Variable&& v, std::string_view name) { declare(std::move(v), name); });
    }
  }

  void declare(Variable&& v, std::string_view name) {
    const int times = ++names_[name];
    if (times > 1) v.name += '#' + std::to_string(times);  // another scope has one of this name
    if (!scopes_.back().variables.emplace(name, v.name).second) fail("declared twice: " + std::string(name));
    function_->variables.push_back(std::move(v));
  }

  void registers() {
    const Type type = type_of(directive());
    if (type == Type::none) fail("expected the type of a register");
    do {
      const std::string_view name = identifier();
      const int first = static_cast<int>(function_->registers.size());
      uint64_t n = 0;
      if (accept('<')) {
        n = count();
        expect('>');
        scopes_.back().ranges.push_back({name, first, n});
      } else if (!scopes_.back().registers.emplace(name, first).second) {
        fail("a register declared twice");
      } else {
        n = 1;
      }
      function_->registers.resize(first + n, type);
    } while (accept(','));
    expect(';');
  }

  void statement() {
    Statement s;
    s.line = line_;
    s.location = location_;
    if (accept('@')) {
      s.guard_negated = accept('!');
      s.guard = find_register(identifier());
      if (s.guard < 0) fail("the guard is no register");
      skip();
      s.line = line_;
    }
    const std::string_view first = identifier();
    if (peek(':') && at_[1] != ':') {
      ++at_;
      if (s.guard >= 0) fail("a label with a guard");
      return label(first);
    }
    s.opcode = first;
    while (*at_ == '.') {  // modifiers, ".shared::cta"
      ++at_;
      const char* from = at_;
      while (is(*at_, kContinues) || (at_[0] == ':' && at_[1] == ':' && ++at_)) ++at_;
      (s.opcode += '.').append(from, at_ - from);
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
      const char* dot = at_;
      const std::string_view what = directive();
      if (what == "branchtargets") {
        auto& names = scope.label_lists[name];
        do names.push_back(identifier());
        while (accept(','));
        return expect(';');
      }
      if (what == "callprototype" || what == "calltargets") {  // nothing that the call's own variables do not say
        while (skip(), *at_ != ';' && at_ != end_) ++at_;
        scope.variables.emplace(name, name);
        return expect(';');
      }
      at_ = dot;
    }
    if (!scope.labels.emplace(name, static_cast<int>(function_->body.size())).second)
      fail("a label twice in one scope");
  }

  // ---- variables ----

  static Space space_of(std::string_view name) {
    constexpr std::pair<std::string_view, Space> spaces[] = {{"local", Space::local},
                                                             {"shared", Space::shared},
                                                             {"global", Space::global},
                                                             {"const", Space::constant},
                                                             {"param", Space::param}};
    for (const auto& [n, space] : spaces)
      if (n == name) return space;
    return Space::none;
  }

  // ".param .align 8 .b8 x[136]" without what ends it; the elements' layout is left in dimensions_.
  Variable variable(std::string_view* name) {
    Variable v;
    const std::string_view space = directive();
    v.space = space_of(space);
    if (v.space == Space::none) at_ -= space.size() + 1, fail("an unknown directive");
    int vector = 1, alignment = 0;
    while (peek('.')) {
      const std::string_view what = directive();
      if (what == "align") {
        alignment = static_cast<int>(count());
      } else if (what == "attribute") {  // .managed and .unified: all memory is the host's here
        while (skip(), *at_ != ')' && at_ != end_) ++at_;
        expect(')');
      } else if (what == "ptr") {  // the alignment of what it points to
        while (peek('.')) {
          const std::string_view of = directive();
          if (of == "align")
            count();
          else if (space_of(of) == Space::none)
            fail("an unknown attribute of .ptr");
        }
      } else if (what == "v2" || what == "v4") {
        vector = what[1] - '0';
      } else if ((v.type = type_of(what)) == Type::none || v.type == Type::pred) {
        fail("variables of type ." + std::string(what) + " are not supported");
      }
    }
    if (v.type == Type::none) fail("a variable without a type");
    declarator(v, vector, name);
    v.alignment = alignment ? alignment : size_of(v.type) * vector;
    if (v.alignment & (v.alignment - 1)) fail("an alignment that is no power of two");
    return v;
  }
  void declarator(Variable& v, int vector, std::string_view* name) {
    *name = identifier();
    v.name = *name;
    dimensions_.clear();
    while (accept('[')) {
      dimensions_.push_back(peek(']') ? 0 : count());
      expect(']');
    }
    if (vector > 1) dimensions_.push_back(vector);
    v.bytes = size_of(v.type);
    for (int64_t d : dimensions_)
      if (__builtin_mul_overflow(v.bytes, d, &v.bytes)) fail("a variable larger than memory");
  }

  // One or more variables with their initialisers and the semicolon.
  template <class F>
  void variables(bool is_extern, F declare) {
    std::string_view name;
    Variable v = variable(&name);
    const Variable common = v;
    for (;;) {
      v.is_extern = is_extern;
      if (accept('='))
        initialise(v);
      else if (v.bytes == 0 && !is_extern)
        fail("an array without a size");
      declare(std::move(v), name);
      if (!accept(',')) break;
      if (!dimensions_.empty() && dimensions_.back() != 0 && common.alignment > size_of(common.type))
        fail("several vectors in one declaration are not supported");
      v = common;
      declarator(v, 1, &name);
    }
    expect(';');
  }

  void initialise(Variable& v) {
    v.initial.resize(v.bytes);
    if (peek('{')) {
      elements(v, 0, 0);
      v.bytes = static_cast<int64_t>(v.initial.size());
    } else {
      element(v, 0);
    }
  }
  // Braces of one dimension, beginning at an offset; items that are not there are zeros.
  void elements(Variable& v, size_t dimension, int64_t begin) {
    int64_t stride = size_of(v.type);
    for (size_t d = dimension + 1; d < dimensions_.size(); ++d) stride *= dimensions_[d];
    if (dimension >= dimensions_.size()) fail("more braces than dimensions");
    const bool open = dimension == 0 && dimensions_[0] == 0;
    int64_t offset = begin;
    list('{', '}', [&] {
      const bool nested = peek('{');
      if (nested) offset = begin + (offset - begin + stride - 1) / stride * stride;
      const int64_t end = offset + (nested ? stride : size_of(v.type));
      if (open && end > static_cast<int64_t>(v.initial.size())) v.initial.resize(end);
      if (end > (open ? end : begin + stride * dimensions_[dimension])) fail("more initialisers than elements");
      if (nested)
        elements(v, dimension + 1, offset);
      else
        element(v, offset);
      offset = end;
    });
    if (open) v.initial.resize((v.initial.size() + stride - 1) / stride * stride);
  }
  void element(Variable& v, int64_t offset) {
    const int size = size_of(v.type);
    if (!begins_number()) {
      Variable::Reference r = {offset, "", 0, false};
      std::string_view name = identifier();
      if (name == "generic" && accept('(')) {
        r.generic = true;
        name = identifier();
        expect(')');
      }
      if (!globals_.count(name)) unknown(name, line_);
      if (size < 4) fail("an address in an element of less than four bytes");
      r.symbol = name;
      if (peek('+') || peek('-')) r.addend = displacement();
      v.references.push_back(std::move(r));
      return;
    }
    Number n = expression();
    if (peek('(')) fail("mask() in an initialiser is not supported");
    const bool bits = !is_float(v.type) || size_of(v.type) < 4;
    if (n.kind != Operand::Kind::integer && !(bits && size == (n.kind == Operand::Kind::f32 ? 4 : 8)))
      n.bits = converted(n, v.type);
    std::memcpy(&v.initial[offset], &n.bits, std::min(size, 8));
  }
  // A float literal as the bits of a float variable.
  uint64_t converted(const Number& n, Type type) const {
    double value;
    float single;
    std::memcpy(&value, &n.bits, 8);
    std::memcpy(&single, &n.bits, 4);
    if (n.kind == Operand::Kind::f32)
      value = single;
    else
      single = static_cast<float>(value);
    uint64_t bits = 0;
    if (type == Type::f64)
      std::memcpy(&bits, &value, 8);
    else if (type == Type::f32)
      std::memcpy(&bits, &single, 4);
    else
      fail("a float as the initialiser of ." + std::string(row_of(type).name));
    return bits;
  }

  // ---- the module ----

  void statement_of_module() {
    const char* from = at_;
    if (accept(';')) return;
    std::string_view what = directive();
    bool is_extern = false;
    while (what == "visible" || what == "extern" || what == "weak" || what == "common") {
      is_extern |= what == "extern";
      skip();
      from = at_;
      what = directive();
    }
    if (what == "entry" || what == "func") {
      function(what == "entry");
    } else if (what == "version") {
      skip();
      const char* begin = at_;
      while (is(*at_, kContinues) || *at_ == '.') ++at_;
      module_.version.assign(begin, at_);
    } else if (what == "target") {
      module_.target = identifier();
      while (accept(',')) identifier();
    } else if (what == "address_size") {
      if (count() != 64) fail("only 64-bit addresses are supported");
    } else if (what == "file") {
      const size_t index = count();
      if (index > 1'000'000) fail("a file index beyond all measure");
      std::string name(quoted());
      if (peek('"')) name += '/' + std::string(quoted());
      while (accept(',')) count();  // time and size
      if (module_.files.size() <= index) module_.files.resize(index + 1);
      module_.files[index] = name;
    } else if (what == "section") {
      while (skip(), *at_ != '{' && at_ != end_) ++at_;
      expect('{');
      while (skip(), *at_ != '}' && at_ != end_) ++at_;
      expect('}');
    } else if (what == "pragma") {
      pragma();
    } else {
      at_ = from;
      variables(is_extern, [&](Variable&& v, std::string_view name) {
        globals_.insert(name);
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
    names_.clear();
    scopes_.clear();
    scopes_.emplace_back();
    const auto parameters = [&](std::vector<Variable>& to) {
      list('(', ')', [&] {
        std::string_view name;
        to.push_back(variable(&name));
        if (to.back().space != Space::param) fail("only .param parameters are supported");
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
    const char* from = at_;
    const std::string_view what = directive();
    const auto triple = [&](unsigned to[3]) {
      to[1] = to[2] = 1;
      int n = 0;
      do {
        if (n == 3) fail("more than three dimensions");
        to[n++] = count();
      } while (accept(','));
    };
    if (what == "maxntid")
      triple(f.max_threads);
    else if (what == "reqntid")
      triple(f.required_threads);
    else if (what == "reqnctapercluster")
      triple(f.cluster);
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
      at_ = from, fail("an unknown directive");
  }

  const char *begin_, *at_, *end_;
  int line_ = 1;
  Module module_;
  std::unordered_set<std::string_view> globals_;            // variables and functions
  std::unordered_map<std::string_view, size_t> functions_;  // their indices
  std::unordered_map<uint64_t, int> latest_;                // locations by file, line and column
  std::vector<int64_t> dimensions_;                         // of the variable being declared; 0: []

  Function* function_ = nullptr;
  int location_ = 0;
  bool unresolved_ = false;                          // the operand just read has an unknown name
  std::vector<Scope> scopes_;                        // the function's parameters, its body, blocks within
  std::unordered_map<std::string_view, int> names_;  // how many variables of the function are called so
};

}  // namespace

Type type_of(std::string_view name) {
  for (size_t i = 1; i < std::size(kTypes); ++i)
    if (kTypes[i].name == name) return static_cast<Type>(i);
  return Type::none;
}
int size_of(Type t) { return row_of(t).bytes; }
bool is_signed(Type t) { return row_of(t).group == 's'; }
bool is_float(Type t) { return row_of(t).group == 'f'; }

Module parse(std::string_view text) {
  while (!text.empty() && text.back() == '\0') text.remove_suffix(1);  // of a fat binary
  const std::string copy(text);                                        // for the zero that ends it
  return Parser(copy.data(), copy.data() + copy.size()).parse();
}

}  // namespace forwardpass::ptx
