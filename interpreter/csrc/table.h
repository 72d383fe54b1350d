#pragma once
// The instruction table. A row is a family of spellings, its section of the PTX ISA, and a bind function that turns a
// statement into an Instruction. What no row matches is a hard error that names the line.
//
// Pattern: slots separated by dots, matched against the dotted parts of the opcode. "a|b" are alternatives, "?" at the
// end makes a slot optional: "add.sat?.s32", "ld.volatile?.global|shared|local?.v2|v4?.b8|b16|b32". Matching
// backtracks, the first matching row wins. ':' within a modifier (".shared::cta") is part of its slot.
//
//   const Row rows[] = {
//       {"popc.b32|b64", "9.7.1.16", [](Bind& b) {
//          b.destination(0, Type::u32);
//          b.source(1, b.type(1));
//          b.run(b.type(1) == Type::b32 ? &popc<uint32_t> : &popc<uint64_t>);
//        }},
//   };
//   const Register registered(rows);      // at namespace scope: adds the rows to the table
#include <cstddef>
#include <string>
#include <string_view>
#include <vector>

#include "program.h"

namespace gpuless {

class Bind;

struct Row {
  const char* pattern;
  const char* section;
  void (*bind)(Bind&);
};

struct Register {
  template <size_t N>
  explicit Register(const Row (&rows)[N]) : Register(rows, N) {}
  Register(const Row* rows, size_t count);
};

// Every registered row, in order: tests compare this list with what they cover.
std::vector<const Row*> all_rows();
// The slots of a matched opcode (absent optional ones are ""), or false.
bool match(const char* pattern, std::string_view opcode, std::vector<std::string_view>& slots);

// What a bind function has in hand. Operand numbers are those of the statement, as written.
class Bind {
 public:
  Bind(Module& module, Code& code, const Statement& statement, Instruction& instruction,
       const std::vector<std::string_view>& slots);

  // The matched opcode.
  std::string_view slot(int i) const { return slots_[i]; }
  bool has(std::string_view modifier) const;  // in any slot
  Type type(int i) const;                     // of the slot, which must be a type
  int slots() const { return static_cast<int>(slots_.size()); }

  // The operands, checked against the type: registers must have its size (relaxed: at least its size, as of ld, st,
  // cvt; the true size comes back). Each adds one Offset to Instruction::operand.
  int operands() const { return static_cast<int>(statement.operands.size()); }
  const Operand& operand(int i) const {
    if (i >= operands()) refuse("it takes more operands than " + std::to_string(operands()));
    return statement.operands[i];
  }
  void destination(int i, Type type) { destination(operand(i), type); }
  void destination(const Operand& o, Type type);
  int destination_relaxed(const Operand& o, Type type);  // bytes of the register (0 for `_`)
  void source(int i, Type type) { source(operand(i), type); }
  void source(const Operand& o, Type type);  // register, immediate, special register, symbol's address
  int source_relaxed(const Operand& o, Type type);
  // A predicate source with its negation: adds the offset; true if it is negated.
  bool predicate(const Operand& o);
  // An address [base + displacement]: adds the base (a register, or a preset with the symbol's address) and returns the
  // displacement; *wide tells a 64-bit base. The handler's own address code is Warp::addresses.
  int64_t address(const Operand& o, bool* wide);
  int64_t constant(const Operand& o) const;  // an integer immediate, else refuse

  void run(Handler handler) { instruction.run = handler; }
  void collective() { instruction.collective = true; }
  template <class T>
  T& data() {  // a row specific record that lives as long as the code
    auto data = std::make_shared<T>();
    instruction.data = data.get();
    code.data.push_back(data);
    return *data;
  }
  [[noreturn]] void refuse(const std::string& why) const;  // throws a Finding of kind unsupported

  Module& module;
  Code& code;
  const Statement& statement;
  Instruction& instruction;

 private:
  Offset value(const Operand& o, Type type, bool relaxed, int* bytes);
  void add(Offset offset, bool destination);
  const std::vector<std::string_view>& slots_;
};

// The row of an opcode with its slots, or null.
const Row* find_row(std::string_view opcode, std::vector<std::string_view>& slots);

}  // namespace gpuless
