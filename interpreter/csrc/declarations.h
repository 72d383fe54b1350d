#pragma once
// Variables and parameters with their initialisers (ISA 5.3 and 5.4).
#include <unordered_set>
#include <utility>

#include "lexer.h"

namespace gpuless::ptx {

class Declarations : public Lexer {
 protected:
  using Lexer::Lexer;

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
    const char* from = cursor_;
    v.space = space_of(directive());
    if (v.space == Space::none) cursor_ = from, fail("an unknown directive");
    vector_ = 1;
    int alignment = 0;
    while (peek('.')) {
      const std::string_view what = directive();
      if (what == "align") {
        alignment = static_cast<int>(count());
        if (alignment > kMostAlignment) fail("an alignment of more than " + std::to_string(kMostAlignment) + " bytes");
      } else if (what == "attribute") {  // .managed and .unified: all memory is the host's here
        while (skip(), *cursor_ != ')' && cursor_ != end_) ++cursor_;
        expect(')');
      } else if (what == "ptr") {  // the alignment of what it points to
        while (peek('.')) {
          const std::string_view attribute = directive();
          if (attribute == "align")
            count();
          else if (space_of(attribute) == Space::none)
            fail("an unknown attribute of .ptr");
        }
      } else if (what == "v2" || what == "v4") {
        vector_ = what[1] - '0';
      } else if ((v.type = type_of(what)) == Type::none || v.type == Type::pred) {
        fail("variables of type ." + std::string(what) + " are not supported");
      }
    }
    if (v.type == Type::none) fail("a variable without a type");
    declarator(v, name);
    v.alignment = alignment ? alignment : size_of(v.type) * vector_;
    if (v.alignment & (v.alignment - 1)) fail("an alignment that is no power of two");
    return v;
  }
  void declarator(Variable& v, std::string_view* name) {
    *name = identifier();
    v.name = *name;
    dimensions_.clear();
    while (accept('[')) {
      dimensions_.push_back(peek(']') ? 0 : count());
      if (dimensions_.back() == 0 && dimensions_.size() > 1) fail("only the first dimension may be left open");
      expect(']');
    }
    if (vector_ > 1) dimensions_.push_back(vector_);
    v.bytes = size_of(v.type);
    for (int64_t d : dimensions_) {
      if (d && v.bytes > kMostGlobal / d) too_large();
      v.bytes *= std::max<int64_t>(d, 1);
    }
    if (!dimensions_.empty() && dimensions_[0] == 0) v.bytes = 0;
  }

  [[noreturn]] void too_large() const { fail("a variable of more than " + std::to_string(kMostGlobal) + " bytes"); }

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
      v = common;
      declarator(v, &name);
    }
    expect(';');
  }

  void initialise(Variable& v) {
    if (peek('{')) {
      elements(v, 0, 0);
      if (v.bytes == 0) v.bytes = static_cast<int64_t>(v.initial.size());
    } else {
      element(v, 0);
    }
  }
  // Braces of one dimension, beginning at an offset; items that are not there are zeros.
  void elements(Variable& v, size_t dimension, int64_t begin) {
    const Nesting nesting(*this);
    int64_t stride = size_of(v.type);
    for (size_t d = dimension + 1; d < dimensions_.size(); ++d) stride *= dimensions_[d];
    if (dimension >= dimensions_.size()) fail("more braces than dimensions");
    const bool open = dimension == 0 && dimensions_[0] == 0;
    int64_t offset = begin;
    list('{', '}', [&] {
      const bool nested = peek('{');
      if (nested) offset = begin + (offset - begin + stride - 1) / stride * stride;
      const int64_t end = offset + (nested ? stride : size_of(v.type));
      if (open) grow(v, end);
      if (end > (open ? end : begin + stride * dimensions_[dimension])) fail("more initialisers than elements");
      if (nested)
        elements(v, dimension + 1, offset);
      else
        element(v, offset);
      offset = end;
    });
    if (open) v.initial.resize((v.initial.size() + stride - 1) / stride * stride);
  }
  // Makes room for initial values up to `end`: for those that the text has, not for the whole variable.
  void grow(Variable& v, int64_t end) const {
    if (end > kMostGlobal) too_large();
    if (static_cast<int64_t>(v.initial.size()) < end) v.initial.resize(end);
  }
  void element(Variable& v, int64_t offset) {
    const int size = size_of(v.type);
    grow(v, offset + size);
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
    const bool is_integer = n.kind == Operand::Kind::integer;
    if (is_float(v.type)) {
      if (is_integer && n.bits != 0) fail("an integer as the initialiser of a float variable");
      n.bits = is_integer ? 0 : converted(n, v.type);
    } else if (!is_integer && size != (n.kind == Operand::Kind::f32 ? 4 : 8)) {
      fail("a float as the initialiser of a variable of another size");
    }
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
      fail("only .f32 and .f64 variables have float initialisers");
    return bits;
  }

  std::unordered_set<std::string_view> globals_;  // the names that an initialiser may mention: variables and functions

 private:
  int vector_ = 1;                   // elements of .v2 and .v4
  std::vector<int64_t> dimensions_;  // of the variable being declared; 0: []
};

}  // namespace gpuless::ptx
