#pragma once
// PTX as text says it: the syntax tree that parser.cpp makes. Registers and labels are resolved, nothing else is known
// about any instruction. PTX ISA 9.0 sections 4 and 5.
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

namespace gpuless::ptx {

// clang-format off
enum class Type : uint8_t {
  none, pred, b8, u8, s8, b16, u16, s16, f16, bf16, b32, u32, s32, f32, f16x2, bf16x2, tf32, b64, u64, s64, f64, f32x2,
  b128, e4m3, e5m2, e4m3x2, e5m2x2,
};
// clang-format on

Type type_of(std::string_view name);  // "u32" -> Type::u32; Type::none for anything else
int size_of(Type);                    // bytes; a predicate counts as 4, as it is one mask for a warp
bool is_signed(Type);                 // s8 ... s64
bool is_float(Type);

enum class Space : uint8_t { none, reg, local, shared, shared_cluster, global, constant, param };

struct Operand {
  enum class Kind : uint8_t {
    reg,      // id
    special,  // name: "%tid.x"
    symbol,   // name + offset of a variable, function or label; label: id is the index of the statement, else -1
    integer,  // bits, two's complement
    f32,      // bits of the literal (0f3F800000); a decimal point literal is f64
    f64,      // bits of the double (0d..., 1.5)
    vector,   // {parts}
    address,  // [parts[0] + offset], parts[0] a register, symbol (offset 0) or integer; further parts: [a, {b, c}]
    pair,     // parts[0] | parts[1], as of setp, shfl, elect
    sink,     // _
  };
  Kind kind = Kind::sink;
  bool negated = false;  // !p
  int id = -1;
  uint64_t bits = 0;
  int64_t offset = 0;
  std::string name;
  std::vector<Operand> parts;
};

struct Statement {
  std::string opcode;  // with its modifiers: "ld.global.v4.u32"
  int guard = -1;      // register of @p
  bool guard_negated = false;
  std::vector<Operand> operands;
  // call (retval), target, (params), prototype: operands are [vector of returns, target symbol or register, vector of
  // arguments, prototype symbol]; an absent list is an empty vector, an absent prototype is not there. brx.idx: [index,
  // label list as a vector].
  int line = 0;      // of the PTX text, from 1
  int location = 0;  // into Module::locations
};

// Of .loc: a line of source, and where that was inlined.
struct Location {
  int file = 0, line = 0;  // file: index of .file, 0: none
  int inlined_at = 0;      // another location, 0: nowhere
};

// A variable: .shared, .global, .const, .local of a function, a parameter or a return value, a call's .param.
struct Variable {
  std::string name;
  Space space = Space::none;
  Type type = Type::none;
  int alignment = 1;
  int64_t bytes = 0;  // 0: extern shared, sized at the launch
  bool is_extern = false;
  std::vector<uint8_t> initial;  // the rest is zeros
  struct Reference {
    int64_t offset;
    std::string symbol;
    int64_t addend;
    bool generic;
  };
  std::vector<Reference> references;  // addresses within the initialiser
};

struct Function {
  std::string name;
  bool entry = false;
  bool declared_only = false;  // a prototype: vprintf, __assertfail
  std::vector<Variable> parameters, returns,
      variables;                // variables: .local, .shared, .param within the body; unique names
  std::vector<Type> registers;  // by id
  std::vector<Statement> body;
  unsigned max_threads[3] = {0, 0, 0}, required_threads[3] = {0, 0, 0}, cluster[3] = {0, 0, 0};  // 0: not given
  unsigned max_registers = 0, min_ctas = 0, max_cluster_rank = 0;                                // 0: not given
  bool explicit_cluster = false;  // may only be launched with a cluster
  int line = 0;
};

struct Module {
  std::string version, target;      // "9.0", "sm_90a"
  std::vector<std::string> files;   // by .file index; [0] is empty
  std::vector<Location> locations;  // [0]: none
  std::vector<Variable> variables;
  std::vector<Function> functions;

  // The line of the kernel itself where what is at `location` was inlined, however deep.
  const Location& outermost(int location) const {
    while (locations[location].inlined_at) location = locations[location].inlined_at;
    return locations[location];
  }
};

struct SyntaxError {
  int line;
  std::string message;
};

// Throws SyntaxError.
Module parse(std::string_view text);

}  // namespace gpuless::ptx
