#pragma once
// A kernel ready to run: every instruction a handler and the places of its operands.
//
// A frame holds one function's registers for the 32 lanes of a warp, lane by lane: a predicate is one 32-bit mask,
// 8- and 16-bit registers are uint16_t[32], 32-bit ones uint32_t[32], 64-bit ones uint64_t[32], 128-bit ones
// [2][32] x uint64_t. Immediates and special registers are registers too, filled when a frame or a CTA begins, so
// that a handler sees nothing but offsets.
#include <cstdint>
#include <deque>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <vector>

#include "ptx.h"

namespace gpuless {

using ptx::Operand;
using ptx::Statement;
using ptx::Type;

using Mask = uint32_t;
constexpr int kLanes = 32;
constexpr Mask kAllLanes = ~Mask{0};

struct Warp;
struct Instruction;

enum class Step : uint8_t {
  next,     // go on with the next instruction
  jumped,   // the handler moved the strand (branch, call, return, exit)
  blocked,  // nothing happened; again when something else has (Cluster::events)
  yielded,  // done and go on, but let others run first (a failed try_wait, nanosleep)
};
using Handler = Step (*)(Warp&, const Instruction&, Mask);

using Offset = uint32_t;              // bytes into a frame
constexpr Offset kSink = ~Offset{0};  // destination `_`
constexpr Offset kAlwaysTrue = 0;     // a predicate of ones, the guard of unguarded instructions

// What undefined sources mean to an instruction (undefined.h): a finding; undefined results in the same lanes; those of
// mma; what is stored becomes undefined.
enum class Undefined : uint8_t { finding, lanewise, product, store };

// What an instruction does to an offset on its way to an address (offsets.h). From add to join: in 32 bits.
enum class OffsetRole : uint8_t {
  none,
  add,
  subtract,
  shift,
  multiply,
  multiply_add,
  join,  // or, of numbers that have no bit in common
  copy,
  select,
  widen_signed,  // cvt, mul.wide, mad.wide
  widen_unsigned,
  follow,   // sums, products and shifts in 64 bits
  address,  // accesses memory
};
struct OffsetUse {
  OffsetRole role = OffsetRole::none;
  uint8_t operand = 0;    // of an access: its 64-bit base
  uint8_t constants = 0;  // sources that are no registers of the PTX, a bit each
};
// What other warps may notice of an instruction, or it of them, but for data: it synchronises, or it looks, which
// changes nothing if it finds nothing new (a strong load, a failed wait, an atomic that fails). Orders are explored
// between these.
enum class Visible : uint8_t { no, yes, looks };

// Where an instruction may lead, besides on: branch to Instruction::option, table to data's std::vector<uint32_t>.
enum class Flow : uint8_t { next, branch, table, end };

struct Instruction {
  Handler run = nullptr;
  const Offset* operand = nullptr;  // destinations first, then sources, in the order that the row's bind added them
  uint16_t destinations = 0, sources = 0;
  Offset guard = kAlwaysTrue;
  Mask guard_flip = 0;  // ones: @!p
  uint32_t option = 0;  // row specific, as are the next two
  uint64_t immediate = 0;
  const void* data = nullptr;
  uint32_t index = 0;         // of itself within Code
  bool collective = false;    // waits until the warp has converged, or every part of it is at such an instruction
  bool aligned = false;       // .aligned: waits for lanes that may still come here
  bool updates = false;       // may leave a destination's old value in a lane that it runs for
  bool asynchronous = false;  // reads or writes its registers later (wgmma)
  Visible visible = Visible::no;
  Flow flow = Flow::next;
  Undefined undefined = Undefined::finding;
};

// A register that gets its value when a frame begins. Immediates need none: they are part of Code::image.
struct Preset {
  Offset offset;
  int bytes;                                   // 4 or 8
  uint64_t (*special)(const Warp&, int lane);  // %tid.x and the like; null and no variable: local memory; plus bits
  uint64_t bits = 0;
  int shared = -1;  // by Module::shared: a variable, which each kernel has at a place of its own and which is added
};

struct Code {
  // No Offset is kept anywhere but in operand lists, guards, presets and immediates: share_registers rewrites them.
  std::string name;
  const ptx::Function* source = nullptr;
  std::vector<Instruction> instructions;
  std::vector<const Statement*> statements;  // by instruction index
  std::vector<uint32_t> order;               // by instruction index: who goes first of lanes that have diverged
  std::vector<uint32_t> refused;             // instructions that end a launch where they run: warned of once
  std::vector<OffsetUse> offset_uses;        // by instruction index; empty: no 32-bit arithmetic gets into an address
  std::vector<Preset> presets;
  // By the index of an instruction that looks: places and bytes of the registers that it or a later one may read.
  std::map<uint32_t, std::vector<std::pair<Offset, uint32_t>>> live;
  std::vector<uint8_t> image;                             // what a new frame holds: immediates, the rest poison
  std::vector<Offset> offset_of;                          // by PTX register id
  std::map<std::pair<int, uint64_t>, Offset> immediates;  // by bytes and bits
  bool decoded = false;
  std::deque<std::vector<Offset>> operand_lists;
  std::deque<std::shared_ptr<void>> data;       // what Instruction::data points to
  int64_t local_bytes = 0;                      // depot of one thread
  std::map<std::string, int> shared_variables;  // the .shared ones of its own, by Module::shared
  std::vector<int64_t> shared_offset;  // of an entry, by Module::shared; -1: neither it nor what it calls refers to it
  int64_t shared_bytes = 0;            // of an entry: of those; the dynamic part begins there
  std::map<std::string, int64_t> local_offset, param_offset;  // .local variables; parameters, returns, call parameters
  int64_t param_bytes = 0;      // of the parameter space: own parameters, then returns, then call parameters
  int64_t own_param_bytes = 0;  // of its own parameters alone
  struct Parameter {
    int64_t offset, bytes;
  };
  std::vector<Parameter> parameters, returns;  // in order
  bool calls = false;                          // other functions
};

struct Module {
  ptx::Module source;
  std::string arch;
  uint64_t serial = 0;  // of all modules of the process
  std::map<std::string, Code> functions;
  std::vector<const ptx::Variable*> shared;     // static .shared variables, the module's and all functions'
  std::map<std::string, int> shared_variables;  // the module's, which several functions may use
  std::set<std::string> extern_shared;          // names of the dynamic one
  int64_t extern_alignment = 0;
  struct Global {
    std::string name;
    uint8_t* address;
    int64_t bytes;
    bool constant;
  };
  std::map<std::string, Global> globals;  // .global and .const, alive as long as the module
  std::vector<std::unique_ptr<uint8_t, void (*)(void*)>> storage;
  std::string text;                    // the PTX itself, which messages quote
  bool replicates = false;             // Triton's: warps may share elements, all of them load and one stores
  std::mutex mutex;                    // of the decoding
  std::string_view line(int n) const;  // from 1, without its indentation
};

// Parses and lays out the variables; throws a Finding naming the line and its text.
std::unique_ptr<Module> load(std::string text);

// A function, decoded on its first use together with those it calls, so that what an image holds besides costs nothing.
// Throws a Finding naming an instruction that no row of the table knows; null: there is no such function.
const Code* function(Module&, const std::string& name);

}  // namespace gpuless
