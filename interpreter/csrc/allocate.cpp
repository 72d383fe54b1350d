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

#include "blocks.h"
#include "decode.h"

namespace gpuless {
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
  void clear(int i) { words_[i / 64] &= ~(uint64_t{1} << (i % 64)); }
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

struct Sets {  // of a basic block
  Bits uses, defines, in, out;
};

class Liveness {
 public:
  Liveness(const Code& code, const Registers& registers)
      : code_(code), registers_(registers), blocks_(basic_blocks(code)) {
    const Bits none(code.offset_of.size());
    sets_.assign(blocks_.size(), {none, none, none, none});
    for (size_t b = 0; b < blocks_.size(); ++b) {
      Sets& s = sets_[b];
      for (int k = blocks_[b].begin; k < blocks_[b].end; ++k) {
        registers.visit(code.instructions[k], [&](int id, bool replaces) {
          if (replaces) {
            s.defines.set(id);
          } else if (!s.defines.test(id)) {
            s.uses.set(id);
          }
        });
      }
      s.in.merge(s.uses);
    }
    for (bool again = true; again;) {
      again = false;
      for (size_t b = blocks_.size(); b--;) {
        for (const int n : blocks_[b].next) sets_[b].out.merge(sets_[n].in);
        again |= sets_[b].in.merge(sets_[b].out, &sets_[b].defines);
      }
    }
  }

  std::vector<Interval> intervals() const {
    std::vector<Interval> intervals(code_.offset_of.size());
    for (size_t id = 0; id < intervals.size(); ++id) intervals[id] = {static_cast<int>(id), INT32_MAX, -1};
    const auto extend = [&](int id, int instruction) {
      intervals[id].begin = std::min(intervals[id].begin, instruction);
      intervals[id].end = std::max(intervals[id].end, instruction);
    };
    for (size_t n = 0; n < blocks_.size(); ++n) {
      const BasicBlock& b = blocks_[n];
      sets_[n].in.each([&](int id) { extend(id, b.begin); });
      sets_[n].out.each([&](int id) { extend(id, b.end - 1); });
      for (int k = b.begin; k < b.end; ++k) {
        registers_.visit(code_.instructions[k], [&](int id, bool) { extend(id, k); });
      }
    }
    intervals.erase(std::remove_if(intervals.begin(), intervals.end(), [](const Interval& i) { return i.end < 0; }),
                    intervals.end());
    return intervals;
  }

  // f(instruction, the registers that live before it) for those that look.
  template <class F>
  void each_look(F f) const {
    for (size_t n = 0; n < blocks_.size(); ++n) {
      const BasicBlock& b = blocks_[n];
      const auto looks = [&](int k) { return code_.instructions[k].visible == Visible::looks; };
      int last = b.end - 1;
      while (last >= b.begin && !looks(last)) --last;
      if (last < b.begin) continue;
      Bits live = sets_[n].out;
      for (int k = b.end - 1; k >= b.begin; --k) {
        registers_.visit(code_.instructions[k], [&](int id, bool replaces) {
          if (replaces) live.clear(id);
        });
        registers_.visit(code_.instructions[k], [&](int id, bool replaces) {
          if (!replaces) live.set(id);
        });
        if (looks(k)) f(k, live);
      }
    }
  }

 private:
  const Code& code_;
  const Registers& registers_;
  std::vector<BasicBlock> blocks_;
  std::vector<Sets> sets_;
};

}  // namespace

void share_registers(Code& code) {
  const Registers registers(code);
  const std::vector<char> pin = asynchronous_registers(code, registers);
  const Liveness liveness(code, registers);
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

  const auto add_place = [&](auto& places, int id) {
    const bool predicate = code.source->registers[id] == ptx::Type::pred;
    places.emplace_back(place[id], predicate ? sizeof(Mask) : bytes_of(id));
  };
  liveness.each_look([&](int k, const auto& live) {
    auto& places = code.live[static_cast<uint32_t>(k)];
    live.each([&](int id) { add_place(places, id); });
  });
  auto& all = code.live[kAnywhere];
  for (const Interval& i : intervals) add_place(all, i.id);
  std::sort(all.begin(), all.end());
  all.erase(std::unique(all.begin(), all.end()), all.end());

  // What follows the registers (immediates and presets) moves up behind them.
  uint32_t registers_end = 64;
  for (size_t id = 0; id < place.size(); ++id) registers_end += bytes_of(static_cast<int>(id));
  const auto relocate = [&](Offset& o) {
    if (o == kSink || o == kAlwaysTrue) return;
    o = o >= registers_end ? o - registers_end + end : place[registers.id(o)];
  };
  for (auto& list : code.operand_lists)
    for (Offset& o : list) relocate(o);
  for (Instruction& i : code.instructions) relocate(i.guard);
  for (Preset& p : code.presets) relocate(p.offset);
  for (auto& [key, o] : code.immediates) relocate(o);
  for (Offset& o : code.offset_of) relocate(o);
  code.image.erase(code.image.begin() + end, code.image.begin() + registers_end);
}

}  // namespace gpuless
