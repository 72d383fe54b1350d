#pragma once
// What rows that touch memory share: the address operand with its state space, and how strong the access is.
#include <string_view>

#include "interpreter/machine.h"
#include "interpreter/table.h"

namespace forwardpass::interpreter {

// The state space among the modifiers; none: generic addressing.
inline ptx::Space space_of(const Bind& b) {
  static constexpr std::pair<std::string_view, ptx::Space> names[] = {
      {"shared", ptx::Space::shared}, {"global", ptx::Space::global}, {"const", ptx::Space::constant},
      {"local", ptx::Space::local},   {"param", ptx::Space::param},
  };
  for (int i = 0; i < b.slots(); ++i) {
    const std::string_view name = b.slot(i).substr(0, b.slot(i).find("::"));
    for (const auto& [word, space] : names)
      if (name == word) return space;
  }
  return ptx::Space::none;
}

// Without any of these an access is weak: it must not meet another one unordered (ISA 8.2).
inline bool is_weak(const Bind& b) {
  return !b.has("volatile") && !b.has("relaxed") && !b.has("acquire") && !b.has("release") && !b.has("acq_rel");
}

// The address operand of a row.
struct AddressOperand {
  ptx::Space space;
  bool wide;
  int operand;  // of the instruction
  int64_t displacement;

  void bind(Bind& b, const Operand& o) {
    space = space_of(b);
    operand = b.instruction.destinations + b.instruction.sources;
    displacement = b.address(o, &wide);
  }
  void addresses(const Warp& w, const Instruction& i, uint64_t out[kLanes]) const {
    w.addresses(i, operand, displacement, wide, out);
  }
  void access(Warp& w, const Instruction& i, int bytes, Use use, Mask mask, uint8_t* host[kLanes]) const {
    uint64_t address[kLanes];
    addresses(w, i, address);
    interpreter::access(w, space, address, bytes, use, mask, host);
  }
};

}  // namespace forwardpass::interpreter
