// Where a wgmma.fence is missing: PTX ISA 9.7.15.7.1 wants one before the first wgmma.mma_async, and between any access
// to a register and a wgmma.mma_async that has it in D or A, except where D of another one of the same shape is that
// access. Found when a function is decoded, so that running it costs nothing: forwards through its basic blocks goes,
// for each register, an access that some path has made since its last fence. A path that is never taken counts too.
//
// Copies and constants are no accesses. Compilers put them where they like, behind the fence as well: nvcc the zeros of
// fresh accumulators, Triton a copy of accumulators that are needed again. So a copy is as old as what it copies, and a
// constant as old as the kernel.
//
// ptxas 12.8 and 13.0 see most of these too, and put a fence in themselves (C7519), or let the operations wait for each
// other. Some they order without a word, and which is nowhere promised.
#include <algorithm>

#include "interpreter/blocks.h"
#include "interpreter/decode.h"
#include "interpreter/rows/mov.h"
#include "interpreter/rows/wgmma.h"

namespace forwardpass::interpreter {
namespace {

const WgmmaShape& shape_of(const Instruction& i) { return *static_cast<const WgmmaShape*>(i.data); }

// For one use of registers, which decides what counts as an access: D of a shape, or A.
class Fences {
 public:
  Fences(Code& code, const std::vector<BasicBlock>& blocks, const Registers& registers,
         const std::vector<char>& followed, const WgmmaShape* d)
      : code_(code), blocks_(blocks), registers_(registers), followed_(followed), d_(d) {
    std::vector<Accesses> in(blocks.size(), Accesses(followed.size() + 1, kNone));
    in[0].assign(in[0].size(), static_cast<uint32_t>(code.instructions.size()));
    for (bool again = true; again;) {
      again = false;
      for (size_t b = 0; b < blocks.size(); ++b) {
        Accesses now = in[b];
        for (int k = blocks[b].begin; k < blocks[b].end; ++k) execute(code.instructions[k], now);
        for (const int n : blocks[b].next) again |= join(in[n], now);
      }
    }
    for (size_t b = 0; b < blocks.size(); ++b) {
      for (int k = blocks[b].begin; k < blocks[b].end; ++k) {
        mark(code.instructions[k], in[b]);
        execute(code.instructions[k], in[b]);
      }
    }
  }

 private:
  // By register, and of constants last: the instruction that has accessed it since the last fence; one behind the last
  // instruction: nobody, and there was no fence.
  using Accesses = std::vector<uint32_t>;
  static constexpr uint32_t kNone = ~uint32_t{0};

  static bool join(Accesses& into, const Accesses& from) {
    bool grew = false;
    for (size_t k = 0; k < into.size(); ++k) {
      if (into[k] != kNone || from[k] == kNone) continue;
      into[k] = from[k];
      grew = true;
    }
    return grew;
  }

  size_t source_of(const Instruction& move) const {
    const int id = registers_.id(move.operand[1]);
    return id < 0 ? followed_.size() : static_cast<size_t>(id);
  }

  void execute(const Instruction& i, Accesses& now) const {
    const auto note = [&](int id, uint32_t access) {
      if (id >= 0 && followed_[id] && now[id] == kNone) now[id] = access;
    };
    if (is_wgmma_fence(i)) {
      if (i.guard == kAlwaysTrue) std::fill(now.begin(), now.end(), kNone);
    } else if (is_move(i)) {
      note(registers_.id(i.operand[0]), now[source_of(i)]);
    } else if (i.asynchronous) {
      if (d_ && same_shape(*d_, shape_of(i))) return;
      for (int r = 0; r < i.destinations; ++r) note(registers_.id(i.operand[r]), i.index);
    } else {
      registers_.visit(i, [&](int id, bool) { note(id, i.index); });
    }
  }

  void mark(Instruction& i, const Accesses& now) const {
    if (!i.asynchronous || i.option) return;
    const bool d = d_ && same_shape(*d_, shape_of(i)), a = !d_ && shape_of(i).a_in_registers;
    const int begin = d ? 0 : i.destinations, end = a ? begin + 4 : i.destinations;
    for (int n = begin; n < end; ++n) {
      const uint32_t access = now[registers_.id(i.operand[n])];
      if (access == kNone) continue;
      i.option = 1 + access;
      i.immediate = n;
      return;
    }
  }

  Code& code_;
  const std::vector<BasicBlock>& blocks_;
  const Registers& registers_;
  const std::vector<char>& followed_;
  const WgmmaShape* const d_;  // null: A
};

}  // namespace

void find_missing_wgmma_fences(Code& code) {
  std::vector<const WgmmaShape*> uses;
  bool a_in_registers = false;
  for (const Instruction& i : code.instructions) {
    if (!i.asynchronous) continue;
    const auto same = [&](const WgmmaShape* other) { return same_shape(*other, shape_of(i)); };
    if (std::none_of(uses.begin(), uses.end(), same)) uses.push_back(&shape_of(i));
    a_in_registers |= shape_of(i).a_in_registers;
  }
  if (uses.empty()) return;
  if (a_in_registers) uses.push_back(nullptr);
  const std::vector<BasicBlock> blocks = basic_blocks(code);
  const Registers registers(code);
  const std::vector<char> followed = asynchronous_registers(code, registers);
  for (const WgmmaShape* d : uses) Fences(code, blocks, registers, followed, d);
}

void require_wgmma_fence(const Warp& w, const Instruction& i) {
  if (!i.option) return;
  const auto& statements = w.frame->code->statements;
  const size_t access = i.option - 1;
  const bool d = i.immediate < i.destinations;
  const std::string which =
      "register " + std::to_string(i.immediate - (d ? 0 : i.destinations)) + (d ? " of D" : " of A");
  if (access == statements.size()) {
    w.fail(Kind::race,
           "no wgmma.fence stands before the first wgmma.mma_async, on one path at least: put "
           "wgmma.fence.sync.aligned before it, which orders " +
               which + " and all others");
  }
  w.fail(Kind::race, which + " is accessed by " + statements[access]->opcode + " of " +
                         source_place(*w.cta->launch->module, statements[access]->line) +
                         ", and no wgmma.fence stands between, on one path at least: put wgmma.fence.sync.aligned "
                         "there. If the source has one, the compiler has moved the access across it: keep it before by "
                         "asm volatile(\"\" : \"+f\"(register) :: \"memory\") in front of the fence");
}

}  // namespace forwardpass::interpreter
