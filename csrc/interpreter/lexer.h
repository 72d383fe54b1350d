#pragma once
// The characters of PTX: blanks and comments, names, numbers and constant expressions (ISA 4.3 to 4.5).
#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstring>

#include "limits.h"
#include "ptx.h"

namespace forwardpass::ptx {

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
inline bool is(char c, uint8_t what) { return kClass[static_cast<uint8_t>(c)] & what; }

class Lexer {
 public:
  // The text must be followed by a zero, which ends every loop below.
  Lexer(const char* begin, const char* end) : begin_(begin), at_(begin), end_(end) {}

 protected:
  [[noreturn]] void fail(const std::string& why) const {
    const char *from = at_, *to = at_;
    while (from > begin_ && from[-1] != '\n') --from;
    while (to < end_ && *to != '\n') ++to;
    while (from < to && is(*from, kBlank)) ++from;
    throw SyntaxError{line_, why + ": " + std::string(from, std::min<std::ptrdiff_t>(to - from, 200))};
  }

  // One level of nesting in the text, which is one of recursion in the parser. Limits the depth.
  class Nesting {
   public:
    explicit Nesting(Lexer& lexer) : lexer_(lexer) {
      if (++lexer_.depth_ > kMostNested) lexer_.fail("nested more than " + std::to_string(kMostNested) + " deep");
    }
    ~Nesting() { --lexer_.depth_; }
    Nesting(const Nesting&) = delete;

   private:
    Lexer& lexer_;
  };
  // Adds a declaration to the total of a text, at its alignment. Fails beyond `most` bytes.
  void claim(int64_t& total, int64_t bytes, int64_t alignment, int64_t most, const std::string& what) const {
    const int64_t begin = (total + alignment - 1) / alignment * alignment;
    if (begin > most || bytes > most - begin) fail(what + ": there may be " + std::to_string(most) + " bytes");
    total = begin + bytes;
  }
  [[noreturn]] static void unknown(std::string_view name, int line) {
    throw SyntaxError{line, "nothing of this name has been declared: " + std::string(name)};
  }
  // The compilers' marks around inline assembly.
  void comment(std::string_view text) {
    if (text == " begin inline asm") inline_ = true;
    if (text == " end inline asm") inline_ = false;
  }
  void skip() {
    for (;;) {
      if (is(*at_, kBlank)) {
        ++at_;
      } else if (*at_ == '\n') {
        ++at_, ++line_;
      } else if (at_[0] == '/' && at_[1] == '/') {
        const char* from = at_ += 2;
        while (at_ != end_ && *at_ != '\n') ++at_;
        comment({from, static_cast<size_t>(at_ - from)});
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
    if (is(*at_, kContinues)) fail("not a number");
    return n;
  }

  Number unary() {
    const Nesting nesting(*this);
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

  // "+ 4" or "- 4", of which the next character is the sign.
  int64_t displacement() {
    const bool minus = *at_++ == '-';
    const uint64_t value = integer(expression());
    return static_cast<int64_t>(minus ? -value : value);
  }

  const char *begin_, *at_, *end_;
  int line_ = 1;
  int depth_ = 0;        // of Nesting
  bool inline_ = false;  // within inline assembly
};

}  // namespace forwardpass::ptx
