#include "timeline_ops.h"

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "blocks.h"

namespace gpuless {

const char* const kPipeNames[kPipes] = {"integer",          "float",      "float64",         "half",
                                        "special function", "conversion", "shuffle and vote"};

namespace {

bool begins(const std::string& text, const char* with) { return text.rfind(with, 0) == 0; }
bool contains(const std::string& text, const char* part) { return text.find(part) != std::string::npos; }
bool ends(const std::string& text, const char* with) {
  const size_t n = std::strlen(with);
  return text.size() >= n && text.compare(text.size() - n, n, with) == 0;
}
bool is_64_bits(const std::string& opcode) {
  return ends(opcode, "64") && !begins(opcode, "mul.wide") && !begins(opcode, "mad.wide");
}

// Instructions of the machine for one of PTX's, where there are several: assumed, after what nvcc 13.0 makes of them.
// The first that fits; `part` must be within the opcode too.
struct Expansion {
  const char *begin, *part;
  uint16_t slots;
};
constexpr Expansion kExpansions[] = {
    {"div.rn", "f32", 10},       {"div.full", "", 8},       {"div.approx", "", 3},     {"div.rn", "f64", 16},
    {"div.", "64", 80},          {"rem.", "64", 80},        {"div.", "32", 20},        {"rem.", "32", 22},
    {"sqrt.rn", "", 10},         {"rcp.rn", "", 8},         {"ex2.approx.ftz", "", 1}, {"ex2.approx.f32", "", 4},
    {"lg2.approx.ftz", "", 1},   {"lg2.approx.f32", "", 4}, {"sin.", "", 2},           {"cos.", "", 2},
    {"rsqrt.approx.f32", "", 4}, {"mul.lo", "64", 4},       {"mad.lo", "64", 4},       {"mul.hi", "64", 10},
};

uint16_t slots_of(const std::string& opcode, const std::string& name) {
  for (const Expansion& e : kExpansions)
    if (begins(opcode, e.begin) && contains(opcode, e.part)) return e.slots;
  return (name == "integer" || name == "logic" || name == "compare") && is_64_bits(opcode) ? 2 : 1;
}

// A conversion that costs nothing: a register's upper half is a zero, or is not looked at.
bool is_free_conversion(const std::string& opcode) {
  static constexpr const char* kFree[] = {"cvt.u64.u32", "cvt.u32.u64", "cvt.u16.u32", "cvt.u16.u64",
                                          "cvt.s32.s64", "cvt.u32.s64", "cvt.s32.u64", "cvt.u64.u64",
                                          "cvt.u32.u32", "cvt.s32.s32", "cvt.u64.s64", "cvt.s64.u64"};
  return std::any_of(std::begin(kFree), std::end(kFree), [&](const char* f) { return opcode == f; });
}

bool reads_special_register(const Statement& s) {
  return std::any_of(s.operands.begin(), s.operands.end(),
                     [](const Operand& o) { return o.kind == Operand::Kind::special; });
}

Op::Kind copy_kind(const std::string& opcode) {
  if (contains(opcode, "commit_group")) return Op::Kind::copy_commit;
  if (contains(opcode, "wait_")) return Op::Kind::copy_wait;
  return Op::Kind::copy;
}
Op::Kind bulk_kind(const std::string& opcode) {
  if (contains(opcode, "commit_group")) return Op::Kind::bulk_commit;
  if (contains(opcode, "wait_group")) return Op::Kind::bulk_wait;
  return Op::Kind::bulk;
}

Op op_of(const Statement& s, const Instruction& i, const std::string& name) {
  using Kind = Op::Kind;
  Op op;
  const std::string& opcode = s.opcode;
  op.slots = slots_of(opcode, name);
  op.groups = static_cast<uint32_t>(i.immediate);
  if (name == "float") {
    op.pipe = Pipe::floating;
  } else if (name == "float64") {
    op.pipe = Pipe::float64;
  } else if (name == "half") {
    op.pipe = Pipe::half;
  } else if (name == "special function") {
    op.pipe = Pipe::special;
  } else if (name == "conversion") {
    op.pipe = Pipe::conversion;
    if (is_free_conversion(opcode)) op.kind = Kind::free;
  } else if (name == "shuffle and vote") {
    op.pipe = Pipe::shuffle;
  } else if (name == "move") {
    if (!reads_special_register(s)) op.kind = Kind::free;
  } else if (name == "constant load") {
    op.kind = Kind::free;  // an operand of the instruction that uses it
  } else if (name == "mma") {
    op.kind = Kind::mma;
  } else if (name == "wgmma") {
    op.kind = Kind::wgmma;
  } else if (name == "wgmma wait") {
    op.kind = contains(opcode, "commit_group") ? Kind::wgmma_commit
              : contains(opcode, "wait_group") ? Kind::wgmma_wait
                                               : Kind::alu;  // its fence
  } else if (name == "async copy") {
    op.kind = copy_kind(opcode);
    op.cached = contains(opcode, ".ca");
  } else if (name == "TMA") {
    op.kind = bulk_kind(opcode);
    op.reads_only = contains(opcode, ".read");
  } else if (name == "mbarrier") {
    op.kind = contains(opcode, "_wait") ? Kind::signal_wait : Kind::signal;
  } else if (name == "barrier") {
    if (begins(opcode, "barrier.cluster.arrive")) {
      op.kind = Kind::cluster_arrive;
    } else if (begins(opcode, "barrier.cluster.wait")) {
      op.kind = Kind::cluster_wait;
    } else if (!begins(opcode, "bar.warp")) {
      op.kind = Kind::barrier;
      op.waits = !contains(opcode, ".arrive");
    }
  } else if (name == "fence") {
    op.kind = Kind::fence;
    op.everywhere = contains(opcode, ".gl") || contains(opcode, ".gpu") || contains(opcode, ".sys");
  } else if (name == "control") {
    if (opcode == "griddepcontrol.wait") op.kind = Kind::dependency_wait;
    if (opcode == "griddepcontrol.launch_dependents") op.kind = Kind::trigger;
    if (i.flow == Flow::branch || i.flow == Flow::table || i.flow == Flow::end) op.kind = Kind::branch;
    // ptxas lays code out so that what always follows stands there.
    if (i.flow == Flow::branch && s.guard < 0) op.kind = Kind::free;
  } else if (contains(name, "load") || contains(name, "store") || contains(name, "matrix") || name == "atomic") {
    op.kind = Kind::memory;
    op.loads = i.destinations > 0;
    const bool weak = !contains(opcode, ".cg") && !contains(opcode, ".cv") && !contains(opcode, ".volatile") &&
                      !contains(opcode, ".relaxed") && !contains(opcode, ".acquire");
    op.cached = op.loads && name != "atomic" && weak;
    op.remote = contains(opcode, "shared::cluster");
  }
  return op;
}

// ---- What ptxas joins ----

enum class Join : uint8_t { none, add, logic, shift, product, wide, add64 };
Join join_of(const std::string& opcode) {
  static const std::pair<const char*, Join> kinds[] = {
      {"add.s32", Join::add},       {"add.u32", Join::add},        {"sub.s32", Join::add},
      {"add.s64", Join::add64},     {"add.u64", Join::add64},      {"and.b32", Join::logic},
      {"or.b32", Join::logic},      {"xor.b32", Join::logic},      {"not.b32", Join::logic},
      {"shl.b32", Join::shift},     {"mul.lo.s32", Join::product}, {"mul.lo.u32", Join::product},
      {"mul.wide.s32", Join::wide}, {"mul.wide.u32", Join::wide},
  };
  for (const auto& [name, join] : kinds)
    if (opcode == name) return join;
  return Join::none;
}

// Whether an instruction can take in the one that made one of its operands: IADD3, LEA, IMAD, LOP3, IMAD.WIDE.
bool joins(Join producer, Join consumer) {
  if (consumer == Join::add) return producer == Join::add || producer == Join::shift || producer == Join::product;
  if (consumer == Join::logic) return producer == Join::logic;
  return consumer == Join::add64 && producer == Join::wide;
}

void join(const Code& code, Op* ops) {
  const auto& statements = code.statements;
  std::unordered_map<int, int> uses;
  std::unordered_map<int, bool> only_addresses;  // registers that nothing but addresses uses
  for (size_t k = 0; k < statements.size(); ++k) {
    const auto& operands = statements[k]->operands;
    for (size_t o = 0; o < operands.size(); ++o) {
      const bool address = operands[o].kind == Operand::Kind::address;
      const bool written = !o && writes_first_operand(*statements[k], code.instructions[k]);
      each_register(operands[o], [&](int id) {
        if (written) return;
        ++uses[id];
        const auto [entry, first] = only_addresses.emplace(id, address);
        entry->second &= address;
      });
    }
    if (statements[k]->guard >= 0) ++uses[statements[k]->guard];
  }
  for (const BasicBlock& block : basic_blocks(code)) {
    std::unordered_map<int, int> producer;  // register -> instruction of this block, not joined itself
    for (int k = block.begin; k < block.end; ++k) {
      const Statement& s = *statements[static_cast<size_t>(k)];
      const Join kind = join_of(s.opcode);
      if (kind == Join::none || s.guard >= 0 || s.operands.size() < 2) continue;
      for (size_t o = 1; o < s.operands.size(); ++o) {
        if (s.operands[o].kind != Operand::Kind::reg) continue;
        const auto p = producer.find(s.operands[o].id);
        if (p == producer.end() || uses[p->first] != 1) continue;
        if (!joins(join_of(statements[static_cast<size_t>(p->second)]->opcode), kind)) continue;
        ops[p->second].kind = Op::Kind::free;
        if (kind == Join::add64) ops[k].slots = 1;
        producer.erase(p);
        break;
      }
      const Operand& d = s.operands[0];
      if (d.kind != Operand::Kind::reg) continue;
      producer[d.id] = k;
      // base + constant, for addresses alone: a displacement of theirs
      const bool constant = s.operands.back().kind == Operand::Kind::integer;
      const bool elsewhere = s.operands[1].kind == Operand::Kind::reg && s.operands[1].id != d.id;
      const auto only = only_addresses.find(d.id);
      if ((kind == Join::add || kind == Join::add64) && constant && elsewhere && only != only_addresses.end() &&
          only->second) {
        ops[k].kind = Op::Kind::free;
        producer.erase(d.id);
      }
    }
  }
}

}  // namespace

void Ops::add(const Module& m, const Code& code) {
  const size_t begin = ops.size();
  auto described = describe(m, code);
  // By PTX register: the places that registers share (allocate.cpp) would be dependences that no compiler makes.
  const uint32_t first_register = register_count;
  register_count += static_cast<uint32_t>(code.source->registers.size());
  for (size_t k = 0; k < code.instructions.size(); ++k) {
    const Instruction& i = code.instructions[k];
    const Statement& statement = *code.statements[k];
    Op op = op_of(statement, i, described[k].name);
    const MatrixWork& work = described[k].work;
    if (!work.type.empty()) {
      const std::string type = std::string(described[k].name) + " " + work.type;
      const auto known = std::find(matrix_types.begin(), matrix_types.end(), type);
      op.matrix_type = static_cast<uint32_t>(known - matrix_types.begin());
      if (known == matrix_types.end()) matrix_types.push_back(type);
      op.macs = static_cast<uint32_t>(work.macs);
      op.matrix_bytes = static_cast<uint32_t>(work.shared_bytes);
    }
    op.first = static_cast<uint32_t>(registers.size());
    const auto add_registers = [&](size_t operand) {
      const size_t before = registers.size();
      each_register(statement.operands[operand],
                    [&](int id) { registers.push_back(first_register + static_cast<uint32_t>(id)); });
      return static_cast<uint16_t>(registers.size() - before);
    };
    const bool writes = writes_first_operand(statement, i);
    // The accumulators of wgmma are waited for by its groups.
    if (writes && op.kind != Op::Kind::wgmma) op.destinations = add_registers(0);
    for (size_t o = writes; o < statement.operands.size(); ++o) {
      op.sources = static_cast<uint16_t>(op.sources + add_registers(o));
    }
    op.guarded = statement.guard >= 0;
    if (op.guarded) registers.push_back(first_register + static_cast<uint32_t>(statement.guard));
    ops.push_back(op);
  }
  join(code, ops.data() + begin);
  schedule(code, described.data(), ops.data() + begin, begin ? ops[begin - 1].segment + 1 : 0);
  lines.insert(lines.end(), std::make_move_iterator(described.begin()), std::make_move_iterator(described.end()));
}

}  // namespace gpuless
