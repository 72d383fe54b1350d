#pragma once
// The characters of PTX: blanks and comments, names, numbers and constant expressions (ISA 4.3 to 4.5).
#include <algorithm>
#include <array>
#include <charconv>
#include <cstddef>
#include <cstring>

#include "ptx.h"
#include "ptx_limits.h"

namespace gpuless::ptx {

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
  Lexer(const char* begin, const char* end) : begin_(begin), cursor_(begin), end_(end) {}

 protected:
  [[noreturn]] void fail(const std::string& why) const {
    const char *from = cursor_, *to = cursor_;
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
  // Adds a declaration to the total of a text, at its alignment. Fails beyond `limit` bytes.
  void claim(int64_t& total, int64_t bytes, int64_t alignment, int64_t limit, const std::string& what) const {
    const int64_t begin = (total + alignment - 1) / alignment * alignment;
    if (begin > limit || bytes > limit - begin) fail(what + ": there may be " + std::to_string(limit) + " bytes");
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
      if (is(*cursor_, kBlank)) {
        ++cursor_;
      } else if (*cursor_ == '\n') {
        ++cursor_, ++line_;
      } else if (cursor_[0] == '/' && cursor_[1] == '/') {
        const char* from = cursor_ += 2;
        while (cursor_ != end_ && *cursor_ != '\n') ++cursor_;
        comment({from, static_cast<size_t>(cursor_ - from)});
      } else if (cursor_[0] == '/' && cursor_[1] == '*') {
        for (cursor_ += 2; !(cursor_[0] == '*' && cursor_[1] == '/'); ++cursor_) {
          if (cursor_ == end_) fail("a comment without end");
          line_ += *cursor_ == '\n';
        }
        cursor_ += 2;
      } else {
        return;
      }
    }
  }
  bool peek(char c) { return skip(), *cursor_ == c; }
  bool accept(char c) { return peek(c) && (++cursor_, true); }
  void expect(char c) {
    if (!accept(c)) fail(std::string("expected '") + c + "'");
  }
  std::string_view identifier() {
    skip();
    if (!is(*cursor_, kBegins)) fail("expected a name");
    const char* from = cursor_++;
    while (is(*cursor_, kContinues)) ++cursor_;
    return {from, static_cast<size_t>(cursor_ - from)};
  }
  // ".visible" and the like, without the dot; empty if there is none.
  std::string_view directive() {
    if (!accept('.')) return {};
    const char* from = cursor_;
    while (is(*cursor_, kContinues)) ++cursor_;
    return {from, static_cast<size_t>(cursor_ - from)};
  }
  std::string_view quoted() {
    expect('"');
    const char* from = cursor_;
    while (*cursor_ != '"' && *cursor_ != '\n' && cursor_ != end_) ++cursor_;
    std::string_view text(from, cursor_ - from);
    if (*cursor_ != '"') fail("a string without end");
    ++cursor_;
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
  bool warp_size() const { return std::strncmp(cursor_, "WARP_SZ", 7) == 0 && !is(cursor_[7], kContinues); }
  bool begins_number() {
    skip();
    return (*cursor_ >= '0' && *cursor_ <= '9') || *cursor_ == '-' || *cursor_ == '~' || *cursor_ == '(' || warp_size();
  }

  uint64_t digits(int base) {
    uint64_t value = 0;
    const auto [end, error] = std::from_chars(cursor_, end_, value, base);
    if (error != std::errc()) fail("a number that does not fit 64 bits, or has no digits");
    cursor_ = end;
    return value;
  }
  Number literal() {
    skip();
    if (warp_size()) return cursor_ += 7, Number{Operand::Kind::integer, 32};
    const char* from = cursor_;
    Number n;
    const char second = *cursor_ == '0' ? static_cast<char>(cursor_[1] | 0x20) : 0;
    if (second == 'f' || second == 'd') {
      cursor_ += 2;
      n.kind = second == 'f' ? Operand::Kind::f32 : Operand::Kind::f64;
      n.bits = digits(16);
      if (cursor_ - from != (second == 'f' ? 10 : 18)) fail("a 0f literal has 8 hexadecimal digits, a 0d literal 16");
    } else if (second == 'x' || second == 'b') {
      cursor_ += 2;
      n.bits = digits(second == 'x' ? 16 : 2);
    } else {
      while (*cursor_ >= '0' && *cursor_ <= '9') ++cursor_;
      if (*cursor_ == '.' || (*cursor_ | 0x20) == 'e') {
        n.kind = Operand::Kind::f64;
        double value = 0;
        const auto [end, error] = std::from_chars(from, end_, value);
        if (error != std::errc()) fail("a number that is no double");
        cursor_ = end;
        std::memcpy(&n.bits, &value, 8);
      } else {
        cursor_ = from;
        n.bits = digits(*from == '0' ? 8 : 10);
      }
    }
    if (n.kind == Operand::Kind::integer && (*cursor_ == 'U' || *cursor_ == 'u')) ++cursor_;
    if (is(*cursor_, kContinues)) fail("not a number");
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
    if (*cursor_ == '<' || *cursor_ == '>') return {cursor_, cursor_[1] == *cursor_ ? size_t{2} : 0};
    return {cursor_, size_t{std::strchr("|^&+-*/%", *cursor_) && *cursor_}};
  }
  // Constant expressions, ISA 4.5.
  Number expression(int least = 1) {
    Number left = unary();
    for (;;) {
      const std::string_view op = infix();
      const int rank = precedence(op);
      if (rank < least || rank == 0) return left;
      cursor_ += op.size();
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
    const bool minus = *cursor_++ == '-';
    const uint64_t value = integer(expression());
    return static_cast<int64_t>(minus ? -value : value);
  }

  const char *begin_, *cursor_, *end_;
  int line_ = 1;
  int depth_ = 0;        // of Nesting
  bool inline_ = false;  // within inline assembly
};

}  // namespace gpuless::ptx
