// Barriers of a CTA and of a warp, PTX ISA 9.7.13.1 to 9.7.13.3.
#include "../explore/execution.h"
#include "../lanes.h"
#include "../table.h"

namespace gpuless {
namespace {

enum class Verb : uint8_t { sync, arrive, popc, all, any };

struct Barrier {
  Verb verb = Verb::sync;
  bool aligned = true, counted = false, negated = false;
};

// Operands: [destination,] barrier number, [thread count,] [predicate].
Step barrier(Warp& w, const Instruction& i, Mask mask) {
  const Barrier& how = *static_cast<const Barrier*>(i.data);
  const int first = __builtin_ctz(mask), sources = i.destinations;
  const unsigned number = w.operand<uint32_t>(i, sources)[first];
  if (number >= 16) w.fail(Kind::illegal, "barrier " + std::to_string(number) + ": there are 0 to 15", first);
  Cta::NamedBarrier& b = w.cta->barriers[number];
  Strand& s = w.strand();
  if (!s.ticket) {
    if (how.aligned && (mask != w.live)) {
      w.fail(Kind::barrier, "an aligned barrier needs every thread of the warp, and part of it is here");
    }
    const unsigned count = how.counted ? w.operand<uint32_t>(i, sources + 1)[first] : 0;
    if (how.counted && (count == 0 || count % kLanes || count > (w.cta->threads() + kLanes - 1) / kLanes * kLanes)) {
      w.fail(Kind::barrier, "barrier " + std::to_string(number) + " with a thread count of " + std::to_string(count) +
                                ": it must be a multiple of 32 up to the block's " + std::to_string(w.cta->threads()));
    }
    if (b.arrived && b.expected != count) {
      w.fail(Kind::barrier, "barrier " + std::to_string(number) + " is waited for with " + std::to_string(count) +
                                " threads here and " + std::to_string(b.expected) + " elsewhere (0: all)");
    }
    b.expected = count;
    // A warp counts whole where the barrier is aligned, as on hardware: its lanes that have exited too.
    b.arrived += how.aligned && how.counted ? kLanes : __builtin_popcount(mask);
    if (how.verb >= Verb::popc) {
      const Mask p = w.predicate(i.operand[i.destinations + i.sources - 1]) ^ (how.negated ? kAllLanes : 0);
      b.trues += __builtin_popcount(p & mask);
    }
    b.gathering.join(w.knowledge);
    w.release();
    ++w.effects;
    if (Execution* e = w.cta->launch->execution) e->phase(barrier_object(*w.cta, number), b.generation, Touch::arrive);
    if (count && b.arrived > count) {
      w.fail(Kind::barrier, "barrier " + std::to_string(number) + ": " + std::to_string(b.arrived) +
                                " threads have arrived and " + std::to_string(count) + " are expected");
    }
    s.ticket = b.generation;
    if (count ? b.arrived == count : b.arrived >= w.cta->live_threads()) w.cta->finish(b);
    if (how.verb == Verb::arrive) {
      s.ticket = 0;
      return Step::next;
    }
  }
  if (b.generation == s.ticket) return Step::blocked;
  if (Execution* e = w.cta->launch->execution) e->phase(barrier_object(*w.cta, number), s.ticket + 1, Touch::pass);
  s.ticket = 0;
  w.acquire(mask, b.last);
  if (how.verb == Verb::popc) {
    each_lane(mask, [d = w.operand<uint32_t>(i, 0), n = b.last_trues](int l) { d[l] = n; });
  } else if (how.verb >= Verb::all && i.operand[0] != kSink) {
    const bool result = how.verb == Verb::all ? b.last_trues == b.last_arrived : b.last_trues != 0;
    Mask& d = *w.operand<Mask>(i, 0);
    d = (d & ~mask) | (result ? mask : 0);
  }
  return Step::next;
}

void bind_barrier(Bind& b) {
  // bar|barrier . cta? . sync|arrive|red . op? . aligned? . type?
  Barrier& how = b.data<Barrier>();
  const auto name = b.slot(2), op = b.slot(3);
  how.aligned = b.slot(0) == "bar" || b.has("aligned");
  how.verb = name == "sync"     ? Verb::sync
             : name == "arrive" ? Verb::arrive
             : op == "popc"     ? Verb::popc
             : op == "and"      ? Verb::all
                                : Verb::any;
  int next = 0, last = b.operands();
  if (name == "red") {
    b.destination(next++, op == "popc" ? Type::u32 : Type::pred);
    --last;
  }
  b.source(next++, Type::u32);
  if (next < last) {
    b.source(next++, Type::u32);
    how.counted = true;
  }
  if (next != last) b.refuse("a barrier takes its number, a thread count and, for red, a predicate");
  if (name == "arrive" && !how.counted) b.refuse("barrier arrive needs a thread count");
  if (name == "red") how.negated = b.predicate(b.operand(last));
  if (how.aligned) b.collective();
  b.run(barrier);
}

// The lanes of the mask meet, at this instruction or at others of its kind. By the time that it runs, the scheduler has
// let every strand go on that could.
Step bar_warp_sync(Warp& w, const Instruction& i, Mask mask) {
  const auto* members = w.operand<uint32_t>(i, 0);
  const Mask group = members[__builtin_ctz(mask)];
  each_lane(mask, [&](int l) {
    if (members[l] != group) w.fail(Kind::barrier, "bar.warp.sync with different masks in one warp", l);
    if (!(group >> l & 1)) w.fail(Kind::barrier, "bar.warp.sync by a lane that its mask leaves out", l);
  });
  const auto at_one = [&](const Strand& s) {
    const Instruction& there = s.frame->code->instructions[s.pc];
    return s.waiting && there.run == &bar_warp_sync &&
           reinterpret_cast<const uint32_t*>(s.frame->registers + there.operand[0])[__builtin_ctz(s.mask)] == group;
  };
  Mask here = mask;
  for (const Strand& s : w.strands)
    if (at_one(s)) here |= s.mask;
  if (group & w.live & ~here) return Step::blocked;
  for (Strand& s : w.strands) {
    if (&s == &w.strand() || !at_one(s) || (s.mask & ~group)) continue;
    s.waiting = false;
    ++s.pc;
  }
  w.lane_order.meet(group & w.live, w.live, w.knowledge.seen.clocks[w.agent]);
  w.release();
  return Step::next;
}

const Row rows[] = {
    {"bar|barrier.cta?.sync|arrive.aligned?", "9.7.13.1", bind_barrier},
    {"bar|barrier.cta?.red.popc|and|or.aligned?.u32|pred", "9.7.13.1", bind_barrier},
    {"bar.warp.sync", "9.7.13.2",
     [](Bind& b) {
       b.source(0, Type::u32);
       b.collective();
       b.run(bar_warp_sync);
     }},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
