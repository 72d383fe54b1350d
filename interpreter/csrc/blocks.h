#pragma once
// What dataflow over a function's registers needs: its basic blocks, and which PTX registers an instruction uses. All
// of it before share_registers, while every register has a place of its own.
#include <vector>

#include "program.h"

namespace gpuless {

struct BasicBlock {
  int begin, end;         // instructions [begin, end)
  std::vector<int> next;  // blocks that may follow
};
std::vector<BasicBlock> basic_blocks(const Code&);

// By instruction, its place in an order in which every block comes after all those that cannot avoid it: where it
// postdominates a branch, after whatever lies between the two.
std::vector<uint32_t> converging_order(const Code&);

class Registers {
 public:
  explicit Registers(const Code& code) {
    if (!code.offset_of.empty())
      ids_.assign(code.offset_of.back() / 64 + 1, -1);  // which lie in the order of their ids
    for (size_t id = 0; id < code.offset_of.size(); ++id) ids_[code.offset_of[id] / 64] = static_cast<int>(id);
  }
  // The register at an offset, or -1: an immediate, a special register, a sink.
  int id(Offset o) const { return o / 64 < ids_.size() ? ids_[o / 64] : -1; }
  // f(register, whether the instruction replaces its value in all the lanes that it runs for)
  template <class F>
  void visit(const Instruction& i, F f) const {
    const auto each = [&](Offset o, bool replaces) {
      if (const int index = id(o); index >= 0) f(index, replaces);
    };
    for (int k = i.destinations; k < i.destinations + i.sources; ++k) each(i.operand[k], false);
    each(i.guard, false);
    for (int k = 0; k < i.destinations; ++k) each(i.operand[k], i.guard == kAlwaysTrue && !i.updates);
  }

 private:
  std::vector<int> ids_;  // by offset / 64
};

// By register: whether asynchronous operations read or write it after their instruction, or a mov makes it an alias of
// one that they do.
std::vector<char> asynchronous_registers(const Code&, const Registers&);

}  // namespace gpuless
