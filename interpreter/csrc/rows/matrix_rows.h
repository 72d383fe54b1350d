#pragma once
// What the matrix instructions share: shapes, element types, and the demand for a whole warp.
#include <charconv>

#include "matrix.h"
#include "rows/lanewise.h"

namespace gpuless {

struct Shape {
  int m = 0, n = 0, k = 0;
};
inline Shape shape_of(std::string_view s) {  // "m16n8k32"
  Shape shape;
  int* field = nullptr;
  for (const char c : s) {
    if (c >= '0' && c <= '9') {
      *field = *field * 10 + (c - '0');
    } else {
      field = c == 'm' ? &shape.m : c == 'n' ? &shape.n : &shape.k;
    }
  }
  return shape;
}

inline Element element_of(const Bind& b, int slot) {
  switch (b.type(slot)) {
    case Type::f16:
      return Element::f16;
    case Type::bf16:
      return Element::bf16;
    case Type::tf32:
      return Element::tf32;
    case Type::e4m3:
      return Element::e4m3;
    case Type::e5m2:
      return Element::e5m2;
    case Type::s8:
      return Element::s8;
    case Type::u8:
      return Element::u8;
    default:
      b.refuse("internal: no matrix element type");
  }
}
inline bool is_fp8(Element e) { return e == Element::e4m3 || e == Element::e5m2; }
inline int bytes_of(Element e) { return e == Element::tf32 ? 4 : e == Element::f16 || e == Element::bf16 ? 2 : 1; }

inline Accumulate accumulate_of(const Bind& b, int slot) {
  const Type t = b.type(slot);
  return t == Type::f32 ? Accumulate::f32 : t == Type::f16 ? Accumulate::f16 : Accumulate::s32;
}

// 80, 89, 90 ... of a module's target.
inline int capability(const Module& m) {
  int n = 0;  // not atoi: it binds the library to glibc 2.38
  std::from_chars(m.arch.data() + m.arch.find('_') + 1, m.arch.data() + m.arch.size(), n);
  return n;
}
inline void require_capability(const Bind& b, int least) {
  if (capability(b.module) >= least) return;
  b.refuse(b.statement.opcode + " needs sm_" + std::to_string(least) + " or higher, and this PTX is for " +
           b.module.arch + ": compile it for another target");
}

// What only targets with an `a` have, or an `f`, for a family: the PTX for one of them runs on no other GPU.
inline void require_targets(const Bind& b, std::initializer_list<int> numbers) {
  const std::string& arch = b.module.arch;
  const int number = capability(b.module);
  std::string names;
  for (const int n : numbers) {
    if (number == n && (arch.back() == 'a' || arch.back() == 'f')) return;
    names += (names.empty() ? "sm_" : " or sm_") + std::to_string(n) + "a";
  }
  b.refuse(b.statement.opcode + " needs " + names + ", and this PTX is for " + arch + ": compile it for " + names);
}

// The registers of {a, b, ...}; one alone may stand without braces.
inline std::vector<Operand> registers_of(const Bind& b, int operand, size_t count) {
  const Operand& o = b.operand(operand);
  const auto parts = o.kind == Operand::Kind::vector ? o.parts : std::vector<Operand>{o};
  if (parts.size() != count) {
    b.refuse(b.statement.opcode + ": operand " + std::to_string(operand) + " has " + std::to_string(parts.size()) +
             " registers, and the shape needs " + std::to_string(count));
  }
  return parts;
}

// Registers of A, B and D of an mma or mma.sp. Those of A take turns in 8 rows each of so many; half: D is f16.
struct MmaRegisters {
  int a, rows, b, d;
  bool half;
};
// An undefined element of A leaves its row of D undefined, one of B its column, and one of C what is at its place; and
// those rows that are undefined for another reason, which came from `origin`.
void multiply_undefined(Warp&, const Instruction&, const MmaRegisters&, uint32_t undefined_rows = 0,
                        uint32_t origin = 0);

inline void require_whole_warp(const Warp& w, Mask mask) {
  if (mask == kAllLanes) return;
  w.fail(Kind::barrier, "a .sync.aligned matrix instruction needs all 32 lanes of the warp, and " +
                            std::to_string(__builtin_popcount(mask)) + " are here");
}

}  // namespace gpuless
