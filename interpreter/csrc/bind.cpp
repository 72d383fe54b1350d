// From the operands of a statement to offsets into a frame.
#include <algorithm>
#include <cstring>

#include "decode.h"
#include "machine.h"
#include "rows/matrix_rows.h"
#include "special.h"
#include "table.h"

namespace gpuless {

Bind::Bind(Module& module, Code& code, const Statement& statement, Instruction& instruction,
           const std::vector<std::string_view>& slots)
    : module(module), code(code), statement(statement), instruction(instruction), slots_(slots) {
  size_t most = 0;
  for (const Operand& o : statement.operands) most += std::max<size_t>(1, o.parts.size());
  code.operand_lists.emplace_back().reserve(most);
}

void Bind::refuse(const std::string& why) const { gpuless::refuse(module, statement.line, code.name, why); }

bool Bind::has(std::string_view modifier) const {
  for (const auto s : slots_)
    if (s == modifier) return true;
  return false;
}

Type Bind::type(int i) const {
  const Type t = ptx::type_of(slots_[i]);
  if (t == Type::none) refuse("expected a type, found ." + std::string(slots_[i]));
  return t;
}

void Bind::add(Offset offset, bool destination) {
  auto& list = code.operand_lists.back();
  if (destination && instruction.sources) refuse("internal: a destination was bound after a source");
  list.push_back(offset);
  instruction.operand = list.data();
  ++(destination ? instruction.destinations : instruction.sources);
}

namespace {
// Bytes that a register of this type takes for one lane; 8-bit ones are kept in 16.
int stored_bytes(Type t) { return std::max(2, ptx::size_of(t)); }

uint64_t immediate_bits(const Operand& o, Type t) {
  const bool literal64 = o.kind == Operand::Kind::f64;
  double d;
  std::memcpy(&d, &o.bits, 8);
  if (literal64 && t == Type::f32) {
    const float f = static_cast<float>(d);
    uint32_t bits;
    std::memcpy(&bits, &f, 4);
    return bits;
  }
  if (t == Type::pred) return o.bits ? kAllLanes : 0;
  const int size = ptx::size_of(t);
  return size >= 8 ? o.bits : o.bits & ((uint64_t{1} << (8 * size)) - 1);
}

uint64_t dynamic_shared(const Warp& w, int) { return static_cast<uint64_t>(w.cta->launch->code->shared_bytes); }
// The same from sm_100 on: see memory.h.
uint64_t ranked_shared(const Warp& w, int) {
  return w.cta->launch->cluster_size() > 1 ? cluster_address(w.cta->rank, 0) : 0;
}
uint64_t ranked_dynamic_shared(const Warp& w, int lane) { return ranked_shared(w, lane) | dynamic_shared(w, lane); }

template <class T>
void broadcast(uint8_t* lanes, uint64_t bits) {
  const T v = static_cast<T>(bits);
  for (int l = 0; l < kLanes; ++l) std::memcpy(lanes + l * sizeof(T), &v, sizeof(T));
}
}  // namespace

Offset Bind::value(const Operand& o, Type type, bool relaxed, int* bytes) {
  if (bytes) *bytes = type == Type::pred ? 4 : stored_bytes(type);
  if (o.kind != Operand::Kind::reg && stored_bytes(type) > 8) refuse("a 128-bit operand must be a register");
  const auto preset = [&](uint64_t (*special)(const Warp&, int), uint64_t bits, int shared = -1) {
    const int size = stored_bytes(type);
    const Offset offset = static_cast<Offset>(code.image.size());
    code.image.resize(offset + size * kLanes);
    code.presets.push_back({offset, size, special, bits, shared});
    return offset;
  };
  const auto immediate = [&](uint64_t bits) {
    const int size = type == Type::pred ? 4 : stored_bytes(type);
    auto [it, fresh] = code.immediates.try_emplace({type == Type::pred ? 0 : size, bits}, 0);
    if (fresh) {
      it->second = static_cast<Offset>(code.image.size());
      code.image.resize((it->second + size * (type == Type::pred ? 1 : kLanes) + 63) / 64 * 64);
      uint8_t* lanes = code.image.data() + it->second;
      if (size == 2) broadcast<uint16_t>(lanes, bits);
      if (size == 4 && type != Type::pred) broadcast<uint32_t>(lanes, bits);
      if (size == 8) broadcast<uint64_t>(lanes, bits);
      if (type == Type::pred) std::memcpy(lanes, &bits, 4);
    }
    return it->second;
  };
  switch (o.kind) {
    case Operand::Kind::reg: {
      const Type register_type = code.source->registers[o.id];
      const bool fits = (register_type == Type::pred) == (type == Type::pred) &&
                        (ptx::size_of(register_type) == ptx::size_of(type) ||
                         (relaxed && ptx::size_of(register_type) > ptx::size_of(type)));
      if (!fits) refuse("a register's size does not fit the instruction's type");
      if (bytes) *bytes = register_type == Type::pred ? 4 : stored_bytes(register_type);
      return code.offset_of[o.id];
    }
    case Operand::Kind::special:
      if (const SpecialRegister* s = special_register(o.name)) return preset(s->value, 0);
      refuse("special register " + o.name + " is not known");
    case Operand::Kind::symbol: {
      const auto has = [&](const auto& map) { return map.find(o.name) != map.end(); };
      const uint64_t more = static_cast<uint64_t>(o.offset);
      if (has(code.local_offset)) return preset(nullptr, code.local_offset.at(o.name) + more);
      if (has(code.param_offset)) return immediate(code.param_offset.at(o.name) + more);
      const bool ranked = capability(module) >= 100;
      if (module.extern_shared.count(o.name)) return preset(ranked ? ranked_dynamic_shared : dynamic_shared, more);
      if (const int shared = shared_variable(module, code, o.name); shared >= 0) {
        if (code.source->entry && !ranked) return immediate(static_cast<uint64_t>(code.shared_offset[shared]) + more);
        return preset(ranked ? ranked_shared : nullptr, more, shared);
      }
      if (has(module.globals)) return immediate(reinterpret_cast<uint64_t>(module.globals.at(o.name).address) + more);
      if (has(module.functions)) return immediate(reinterpret_cast<uint64_t>(&module.functions.at(o.name)));
      refuse("symbol " + o.name + " is not declared");
    }
    case Operand::Kind::integer:
    case Operand::Kind::f32:
    case Operand::Kind::f64:
      return immediate(immediate_bits(o, type));
    default:
      refuse("an operand has a form that this instruction does not take");
  }
}

void Bind::destination(const Operand& o, Type type) {
  if (o.kind == Operand::Kind::sink) return add(kSink, true);
  if (o.kind != Operand::Kind::reg) refuse("the destination must be a register");
  add(value(o, type, false, nullptr), true);
}

int Bind::destination_relaxed(const Operand& o, Type type) {
  if (o.kind == Operand::Kind::sink) return add(kSink, true), 0;
  if (o.kind != Operand::Kind::reg) refuse("the destination must be a register");
  int bytes;
  add(value(o, type, true, &bytes), true);
  return bytes;
}

void Bind::source(const Operand& o, Type type) { add(value(o, type, false, nullptr), false); }

int Bind::source_relaxed(const Operand& o, Type type) {
  int bytes;
  add(value(o, type, true, &bytes), false);
  return bytes;
}

bool Bind::predicate(const Operand& o) {
  add(value(o, Type::pred, false, nullptr), false);
  return o.negated;
}

int64_t Bind::address(const Operand& o, bool* wide) {
  if (o.kind != Operand::Kind::address) refuse("expected an address in brackets");
  const Operand& base = o.parts[0];
  *wide = base.kind != Operand::Kind::reg || ptx::size_of(code.source->registers[base.id]) == 8;
  add(value(base, *wide ? Type::b64 : Type::b32, false, nullptr), false);
  return o.offset;
}

int64_t Bind::constant(const Operand& o) const {
  if (o.kind != Operand::Kind::integer) refuse("expected an integer constant");
  return static_cast<int64_t>(o.bits);
}

}  // namespace gpuless
