// Where a wgmma.fence is missing: PTX ISA 9.7.15.7.1 wants one before the first wgmma.mma_async, and between any access
// to a register and a wgmma.mma_async that has it in D or A, except where D of another one of the same shape is that
// access. This is found when a function is decoded, so that it costs nothing to run: a forward dataflow analysis over
// the basic blocks has, for each register, an access that some path has made since its last fence. Paths that are never
// taken count too.
//
// Copies and constants are no accesses. Compilers put them where they like, behind the fence as well: nvcc the zeros of
// fresh accumulators, Triton a copy of accumulators that are needed again. So a copy is as old as what it copies, and a
// constant as old as the kernel.
//
// ptxas 12.8 and 13.0 see most of these too, and put a fence in themselves (C7519) or let the operations wait for each
// other (C7515). The rest they order without a word; nothing promises that. So an access behind the fence is against
// the letter of the ISA alone, and a missing fence in front of all is not.
#include <algorithm>

#include "blocks.h"
#include "decode.h"
#include "rows/mov.h"
#include "rows/wgmma.h"

namespace gpuless {
namespace {

const WgmmaShape& shape_of(const Instruction& i) { return *static_cast<const WgmmaShape*>(i.data); }

// What an instruction does to a register that wgmma may access. Each such register has a slot; slot 0 is for constants.
struct Event {
  enum class Kind : uint8_t { access, copy, d, a, fence } kind;
  uint32_t instruction;
  int slot;
  int detail;  // copy: the slot of its source; d, a: which operand
};

// By slot: an instruction that has accessed it since the last fence; the number of instructions, if none has but there
// was no fence yet; or kOrdered.
using Accesses = std::vector<uint32_t>;
constexpr uint32_t kOrdered = ~uint32_t{0};

class MissingFences {
 public:
  explicit MissingFences(Code& code) : code_(code), blocks_(basic_blocks(code)) {
    const Registers registers(code);
    const std::vector<char> asynchronous = asynchronous_registers(code, registers);
    std::vector<int> slots(asynchronous.size(), -1);
    for (size_t id = 0; id < asynchronous.size(); ++id)
      if (asynchronous[id]) slots[id] = slots_++;
    for (const BasicBlock& b : blocks_) {
      events_.emplace_back();
      for (int k = b.begin; k < b.end; ++k) add(code.instructions[k], registers, slots, events_.back());
    }
  }

  // For one use of registers, which says what counts as an access: D of a shape, or A (null).
  void mark(const WgmmaShape* use) {
    std::vector<Accesses> in(blocks_.size(), Accesses(slots_, kOrdered));
    std::vector<char> reached(blocks_.size(), 0), changed = reached;
    in[0].assign(slots_, static_cast<uint32_t>(code_.instructions.size()));
    reached[0] = changed[0] = 1;
    for (bool again = true; again;) {
      again = false;
      for (size_t b = 0; b < blocks_.size(); ++b) {
        if (!changed[b]) continue;
        changed[b] = 0;
        Accesses now = in[b];
        for (const Event& e : events_[b]) pass(e, use, now);
        for (const int n : blocks_[b].next) {
          if (!join(in[n], now) && reached[n]) continue;
          reached[n] = changed[n] = 1;
          again = true;
        }
      }
    }
    for (size_t b = 0; b < blocks_.size(); ++b) {
      for (const Event& e : events_[b]) {
        if (is_use(e, use) && in[b][e.slot] != kOrdered) mark(e, in[b][e.slot]);
        pass(e, use, in[b]);
      }
    }
  }

 private:
  static void add(const Instruction& i, const Registers& registers, const std::vector<int>& slots,
                  std::vector<Event>& events) {
    const auto slot = [&](Offset o) {
      const int id = registers.id(o);
      return id < 0 ? 0 : slots[id];
    };
    if (is_wgmma_fence(i)) {
      if (i.guard == kAlwaysTrue) events.push_back({Event::Kind::fence, i.index, 0, 0});
    } else if (i.asynchronous) {
      const int a = shape_of(i).a_in_registers ? 4 : 0;
      for (int n = 0; n < i.destinations + a; ++n) {
        const auto kind = n < i.destinations ? Event::Kind::d : Event::Kind::a;
        events.push_back({kind, i.index, slot(i.operand[n]), n});
      }
    } else if (is_move(i)) {
      if (const int to = slot(i.operand[0]); to > 0) {
        events.push_back({Event::Kind::copy, i.index, to, slot(i.operand[1])});
      }
    } else {
      registers.visit(i, [&](int id, bool) {
        if (slots[id] > 0) events.push_back({Event::Kind::access, i.index, slots[id], 0});
      });
    }
  }

  bool is_use(const Event& e, const WgmmaShape* use) const {
    if (e.kind == Event::Kind::d) return use && same_shape(*use, shape_of(code_.instructions[e.instruction]));
    return e.kind == Event::Kind::a && !use;
  }

  void pass(const Event& e, const WgmmaShape* use, Accesses& now) const {
    if (e.kind == Event::Kind::fence) {
      std::fill(now.begin(), now.end(), kOrdered);
    } else if (now[e.slot] != kOrdered || e.kind == Event::Kind::a || is_use(e, use)) {
      return;
    } else {
      now[e.slot] = e.kind == Event::Kind::copy ? now[e.detail] : e.instruction;
    }
  }

  static bool join(Accesses& into, const Accesses& from) {
    bool grew = false;
    for (size_t k = 0; k < into.size(); ++k) {
      if (into[k] != kOrdered || from[k] == kOrdered) continue;
      into[k] = from[k];
      grew = true;
    }
    return grew;
  }

  void mark(const Event& e, uint32_t access) {
    Instruction& i = code_.instructions[e.instruction];
    if (i.option) return;
    i.option = 1 + access;
    i.immediate = static_cast<uint64_t>(e.detail);
  }

  Code& code_;
  const std::vector<BasicBlock> blocks_;
  int slots_ = 1;
  std::vector<std::vector<Event>> events_;  // by block
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
  MissingFences missing(code);
  for (const WgmmaShape* use : uses) missing.mark(use);
}

void require_wgmma_fence(const Warp& w, const Instruction& i) {
  if (!i.option) return;
  const auto& statements = w.frame->code->statements;
  const size_t access = i.option - 1;
  const bool d = i.immediate < i.destinations;
  const std::string which =
      "register " + std::to_string(i.immediate - (d ? 0 : i.destinations)) + (d ? " of D" : " of A");
  const bool first = access == statements.size();
  const int line = first ? 0 : statements[access]->line;
  Cluster& cluster = *w.cta->cluster;
  if (cluster.again(Kind::race, line)) return;
  Finding f;
  f.kind = Kind::race;
  if (first) {
    f.message =
        "no wgmma.fence stands before the first wgmma.mma_async, on one path at least: put wgmma.fence.sync.aligned "
        "before it, which orders " +
        which + " and all others";
  } else {
    f.message = which + " is accessed by " + statements[access]->opcode + " of " +
                source_place(*w.cta->launch->module, line) +
                ", and no wgmma.fence stands between, on one path at least: put wgmma.fence.sync.aligned there. If the "
                "source has one, the compiler has moved the access across it: keep it before by asm volatile(\"\" : "
                "\"+f\"(register) :: \"memory\") in front of the fence";
    f.breaks = Breaks::isa;  // no case is known in which ptxas did not keep the order: above
    w.cta->place_other(f, line);
  }
  cluster.report(std::move(f));
}

}  // namespace gpuless
