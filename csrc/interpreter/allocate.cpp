// Registers share their places. PTX is nearly in single-assignment form: a GEMM has thousands of registers and a few
// hundred live ones, and 128 bytes a register for each warp fall out of the caches. Liveness over basic blocks, then a
// linear scan (Poletto and Sarkar, TOPLAS 1999) of each register's hull of live instructions.
//
// Sharing is by lane, as a lane's own path decides what is live in it: divergence changes nothing. But a predicate is
// one mask of all lanes, where another register has the values of two: predicates share among themselves. A source that
// dies and a destination that is born in one instruction do not share, as handlers may write before they have read it
// all.
#include <algorithm>
#include <cstring>
#include <queue>
#include <unordered_map>

#include "decode.h"
#include "rows/mov.h"

namespace forwardpass::interpreter {
namespace {

struct Interval {
  int id;
  int begin, end;  // first and last instruction
};

class Bits {
 public:
  explicit Bits(size_t n) : words_((n + 63) / 64) {}
  bool test(int i) const { return words_[i / 64] >> (i % 64) & 1; }
  void set(int i) { words_[i / 64] |= uint64_t{1} << (i % 64); }
  // this |= from & ~without; true if it grew
  bool merge(const Bits& from, const Bits* without = nullptr) {
    bool grew = false;
    for (size_t k = 0; k < words_.size(); ++k) {
      const uint64_t more = from.words_[k] & (without ? ~without->words_[k] : ~uint64_t{0}) & ~words_[k];
      words_[k] |= more;
      grew |= more != 0;
    }
    return grew;
  }
  template <class F>
  void each(F f) const {
    for (size_t k = 0; k < words_.size(); ++k)
      for (uint64_t w = words_[k]; w; w &= w - 1) f(static_cast<int>(k * 64 + __builtin_ctzll(w)));
  }

 private:
  std::vector<uint64_t> words_;
};

struct Block {
  int begin, end;  // instructions [begin, end)
  std::vector<int> next;
  Bits uses, defines, in, out;
};

class Liveness {
 public:
  explicit Liveness(const Code& code) : code_(code) {
    for (size_t id = 0; id < code.offset_of.size(); ++id) register_at_[code.offset_of[id]] = static_cast<int>(id);
    find_blocks();
    for (bool again = true; again;) {
      again = false;
      for (size_t b = blocks_.size(); b--;) {
        Block& block = blocks_[b];
        for (const int n : block.next) block.out.merge(blocks_[n].in);
        again |= block.in.merge(block.out, &block.defines);
      }
    }
  }

  std::vector<Interval> intervals() const {
    std::vector<Interval> found(code_.offset_of.size());
    for (size_t id = 0; id < found.size(); ++id) found[id] = {static_cast<int>(id), INT32_MAX, -1};
    const auto extend = [&](int id, int at) {
      found[id].begin = std::min(found[id].begin, at);
      found[id].end = std::max(found[id].end, at);
    };
    for (const Block& b : blocks_) {
      b.in.each([&](int id) { extend(id, b.begin); });
      b.out.each([&](int id) { extend(id, b.end - 1); });
      for (int k = b.begin; k < b.end; ++k) visit(code_.instructions[k], [&](int id, bool) { extend(id, k); });
    }
    found.erase(std::remove_if(found.begin(), found.end(), [](const Interval& i) { return i.end < 0; }), found.end());
    return found;
  }

  // f(register, whether the instruction replaces its value in all the lanes that it runs for)
  template <class F>
  void visit(const Instruction& i, F f) const {
    for (int k = i.destinations; k < i.destinations + i.sources; ++k) visit(i.operand[k], false, f);
    visit(i.guard, false, f);
    for (int k = 0; k < i.destinations; ++k) visit(i.operand[k], i.guard == kAlwaysTrue && !i.updates, f);
  }

 private:
  template <class F>
  void visit(Offset o, bool replaces, F f) const {
    if (const auto found = register_at_.find(o); found != register_at_.end()) f(found->second, replaces);
  }

  void find_blocks() {
    const auto& code = code_.instructions;
    std::vector<char> leader(code.size() + 1, 0);
    leader[0] = 1;
    for (size_t k = 0; k < code.size(); ++k) {
      if (code[k].flow == Flow::next) continue;
      leader[k + 1] = 1;
      for (const uint32_t t : branch_targets(code[k])) leader[t] = 1;
    }
    const size_t registers = code_.offset_of.size();
    std::vector<int> block_of(code.size());
    for (size_t k = 0; k < code.size(); ++k) {
      if (leader[k]) {
        blocks_.push_back(
            {static_cast<int>(k), 0, {}, Bits(registers), Bits(registers), Bits(registers), Bits(registers)});
      }
      block_of[k] = static_cast<int>(blocks_.size()) - 1;
      Block& b = blocks_.back();
      b.end = static_cast<int>(k) + 1;
      visit(code[k], [&](int id, bool replaces) {
        if (replaces) {
          b.defines.set(id);
        } else if (!b.defines.test(id)) {
          b.uses.set(id);
        }
      });
    }
    for (Block& b : blocks_) {
      b.in.merge(b.uses);
      const Instruction& last = code[b.end - 1];
      for (const uint32_t t : branch_targets(last)) b.next.push_back(block_of[t]);
      const bool goes_on = last.flow == Flow::next || last.guard != kAlwaysTrue;
      if (goes_on && b.end < static_cast<int>(code.size())) b.next.push_back(block_of[b.end]);
    }
  }

  const Code& code_;
  std::unordered_map<Offset, int> register_at_;
  std::vector<Block> blocks_;
};

// Registers that asynchronous operations read or write after their instruction, and those that a mov makes aliases of
// them.
std::vector<char> pinned(const Code& code, const Liveness& liveness) {
  std::vector<char> found(code.offset_of.size(), 0);
  for (bool again = true; again;) {
    again = false;
    for (const Instruction& i : code.instructions) {
      bool any = i.asynchronous;
      if (is_move(i)) liveness.visit(i, [&](int id, bool) { any |= found[id] != 0; });
      if (!any) continue;
      liveness.visit(i, [&](int id, bool) {
        again |= !found[id];
        found[id] = 1;
      });
    }
  }
  return found;
}

}  // namespace

void share_registers(Code& code) {
  const Liveness liveness(code);
  const std::vector<char> pin = pinned(code, liveness);
  std::vector<Interval> intervals = liveness.intervals();
  std::sort(intervals.begin(), intervals.end(), [](const auto& a, const auto& b) { return a.begin < b.begin; });

  const auto bytes_of = [&](int id) { return frame_bytes(code.source->registers[id]); };
  std::vector<Offset> place(code.offset_of.size(), 0);
  uint32_t end = 64;  // kAlwaysTrue
  const auto kind_of = [&](int id) { return code.source->registers[id] == ptx::Type::pred ? 0 : bytes_of(id); };
  std::unordered_map<uint32_t, std::vector<Offset>> free;  // by kind
  const auto later = [](const Interval& a, const Interval& b) { return a.end > b.end; };
  std::priority_queue<Interval, std::vector<Interval>, decltype(later)> active(later);
  for (const Interval& i : intervals) {
    while (!active.empty() && active.top().end < i.begin) {
      free[kind_of(active.top().id)].push_back(place[active.top().id]);
      active.pop();
    }
    auto& spare = free[kind_of(i.id)];
    if (spare.empty() || pin[i.id]) {
      place[i.id] = end;
      end += bytes_of(i.id);
    } else {
      place[i.id] = spare.back();
      spare.pop_back();
    }
    if (!pin[i.id]) active.push(i);
  }

  // What follows the registers (immediates and presets) moves up behind them.
  uint32_t registers_end = 64;
  for (size_t id = 0; id < place.size(); ++id) registers_end += bytes_of(static_cast<int>(id));
  std::unordered_map<Offset, Offset> moved;
  for (size_t id = 0; id < place.size(); ++id) moved[code.offset_of[id]] = place[id];
  const auto relocate = [&](Offset& o) {
    if (o == kSink || o == kAlwaysTrue) return;
    o = o >= registers_end ? o - registers_end + end : moved.at(o);
  };
  for (auto& list : code.operand_lists)
    for (Offset& o : list) relocate(o);
  for (Instruction& i : code.instructions) relocate(i.guard);
  for (Preset& p : code.presets) relocate(p.offset);
  for (auto& [key, o] : code.immediates) relocate(o);
  for (Offset& o : code.offset_of) relocate(o);
  code.image.erase(code.image.begin() + end, code.image.begin() + registers_end);
}

}  // namespace forwardpass::interpreter
