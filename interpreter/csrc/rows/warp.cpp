// Instructions across a warp: shfl.sync (ISA 9.7.9.6), vote, match, activemask, redux, elect (9.7.13), and the few that
// make a thread wait or stop (9.7.19).
#include <algorithm>
#include <cstdio>

#include "rows/lanewise.h"

namespace gpuless {
namespace {

std::string hex(uint32_t x) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", x);
  return text;
}

// The lanes that take part together with `lane`: its membermask without what has exited. All of them must be here.
Mask members(const Warp& w, const uint32_t* membermask, Mask mask, int lane) {
  const uint32_t named = membermask[lane];
  if (!(named >> lane & 1)) {
    w.fail(Kind::barrier, "a lane executes it that its membermask " + hex(named) + " does not name", lane);
  }
  const Mask missing = named & w.live & ~mask;
  if (missing) {
    w.fail(Kind::barrier,
           "membermask " + hex(named) + " names lane " + std::to_string(__builtin_ctz(missing)) +
               ", which is not here: it is predicated off or on another path",
           lane);
  }
  return named & w.live;
}
// Calls f(lanes) for every set of lanes that take part together; their membermasks must agree.
template <class F>
void each_group(const Warp& w, const uint32_t* membermask, Mask mask, F f) {
  for (Mask rest = mask; rest;) {
    const int lane = __builtin_ctz(rest);
    const Mask group = members(w, membermask, mask, lane);
    for (Mask others = group; others; others &= others - 1) {
      const int other = __builtin_ctz(others);
      if (membermask[other] != membermask[lane]) {
        w.fail(Kind::barrier,
               "lanes " + std::to_string(lane) + " and " + std::to_string(other) +
                   " take part with different membermasks, " + hex(membermask[lane]) + " and " + hex(membermask[other]),
               other);
      }
    }
    f(group);
    rest &= ~group;
  }
}
void put(Warp& w, Offset offset, Mask value, Mask mask) {
  Mask& d = *w.at<Mask>(offset);
  d = (d & ~mask) | (value & mask);
}

// Operands: d, [p,] a, b, c, membermask.
enum class Shuffle { up, down, bfly, idx };
template <Shuffle S>
Step shfl(Warp& w, const Instruction& i, Mask mask) {
  const int first = i.destinations;
  const auto *a = w.operand<uint32_t>(i, first), *b = w.operand<uint32_t>(i, first + 1),
             *c = w.operand<uint32_t>(i, first + 2), *membermask = w.operand<uint32_t>(i, first + 3);
  uint32_t copy[kLanes], result[kLanes];
  std::copy(a, a + kLanes, copy);
  Mask in_range = 0;
  each_group(w, membermask, mask, [&](Mask group) {
    for (Mask rest = group; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      const int value = b[lane] & 31, clamp = c[lane] & 31, segment = c[lane] >> 8 & 31;
      const int low = lane & segment, high = low | (clamp & ~segment);
      const int source = S == Shuffle::up     ? lane - value
                         : S == Shuffle::down ? lane + value
                         : S == Shuffle::bfly ? lane ^ value
                                              : low | (value & ~segment);
      const bool valid = S == Shuffle::up ? source >= high : source <= high;
      const int from = valid ? source : lane;
      if (!(group >> from & 1)) {
        w.fail(Kind::barrier,
               "lane " + std::to_string(lane) + " reads lane " + std::to_string(from) + ", which does not take part",
               lane);
      }
      in_range |= static_cast<Mask>(valid) << lane;
      result[lane] = copy[from];
    }
  });
  uint32_t* d = w.operand<uint32_t>(i, 0);
  each_lane(mask, [&](int l) { d[l] = result[l]; });
  if (i.destinations == 2) put(w, i.operand[1], in_range, mask);
  return Step::next;
}
void bind_shfl(Bind& b) {
  expect_operands(b, 5);
  const Operand& d = b.operand(0);
  const bool pair = d.kind == Operand::Kind::pair;
  destination(b, pair ? d.parts[0] : d, Type::b32);
  if (pair) destination(b, d.parts[1], Type::pred);
  for (int k = 1; k <= 4; ++k) b.source(k, Type::b32);
  b.collective();
  b.run(b.has("up")     ? &shfl<Shuffle::up>
        : b.has("down") ? &shfl<Shuffle::down>
        : b.has("bfly") ? &shfl<Shuffle::bfly>
                        : &shfl<Shuffle::idx>);
}

enum class Vote { all, any, uni };
template <Vote V>
Step vote(Warp& w, const Instruction& i, Mask mask) {
  const Mask p = w.predicate(i.operand[1]) ^ i.option;
  each_group(w, w.operand<uint32_t>(i, 2), mask, [&](Mask group) {
    const Mask yes = p & group;
    const bool result = V == Vote::all ? yes == group : V == Vote::any ? yes != 0 : yes == group || !yes;
    put(w, i.operand[0], result ? group : 0, group);
  });
  return Step::next;
}
Step ballot(Warp& w, const Instruction& i, Mask mask) {
  const Mask p = w.predicate(i.operand[1]) ^ i.option;
  uint32_t* d = w.operand<uint32_t>(i, 0);
  each_group(w, w.operand<uint32_t>(i, 2), mask,
             [&](Mask group) { each_lane(group, [=](int l) { d[l] = p & group; }); });
  return Step::next;
}
void bind_vote(Bind& b) {
  expect_operands(b, 3);
  destination(b, b.operand(0), b.has("ballot") ? Type::b32 : Type::pred);
  b.instruction.option = b.predicate(b.operand(1)) ? kAllLanes : 0;
  b.source(2, Type::b32);
  b.collective();
  b.run(b.has("ballot") ? &ballot
        : b.has("all")  ? &vote<Vote::all>
        : b.has("any")  ? &vote<Vote::any>
                        : &vote<Vote::uni>);
}

// Operands: d, [p,] a, membermask. any: the lanes with the same value; all: everybody, if all have it.
template <class T, bool All>
Step match(Warp& w, const Instruction& i, Mask mask) {
  const T* a = w.operand<T>(i, i.destinations);
  uint32_t result[kLanes];
  Mask agreed = 0;
  each_group(w, w.operand<uint32_t>(i, i.destinations + 1), mask, [&](Mask group) {
    for (Mask rest = group; rest; rest &= rest - 1) {
      const int lane = __builtin_ctz(rest);
      Mask same = 0;
      for (Mask others = group; others; others &= others - 1) {
        const int other = __builtin_ctz(others);
        same |= static_cast<Mask>(a[other] == a[lane]) << other;
      }
      result[lane] = All && same != group ? 0 : same;
      agreed |= static_cast<Mask>(same == group) << lane;
    }
  });
  uint32_t* d = w.operand<uint32_t>(i, 0);
  each_lane(mask, [&](int l) { d[l] = result[l]; });
  if (i.destinations == 2) put(w, i.operand[1], agreed, mask);
  return Step::next;
}
void bind_match(Bind& b) {
  expect_operands(b, 3);
  const Operand& d = b.operand(0);
  const bool all = b.has("all"), pair = d.kind == Operand::Kind::pair;
  if (pair && !all) b.refuse("only match.all has a predicate");
  destination(b, pair ? d.parts[0] : d, Type::b32);
  if (pair) destination(b, d.parts[1], Type::pred);
  b.source(1, b.type(3));
  b.source(2, Type::b32);
  b.collective();
  const bool wide = b.type(3) == Type::b64;
  b.run(all    ? wide ? &match<uint64_t, true> : &match<uint32_t, true>
        : wide ? &match<uint64_t, false>
               : &match<uint32_t, false>);
}

struct Sum {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a + b; }
};
struct Least {
  template <class T>
  T operator()(T a, T b) const {
    return std::min(a, b);
  }
};
struct Greatest {
  template <class T>
  T operator()(T a, T b) const {
    return std::max(a, b);
  }
};
struct Every {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a & b; }
};
struct Some {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a | b; }
};
struct Odd {
  uint32_t operator()(uint32_t a, uint32_t b) const { return a ^ b; }
};
template <class Op, class T>
Step redux(Warp& w, const Instruction& i, Mask mask) {
  const T* a = w.operand<T>(i, 1);
  T* d = w.operand<T>(i, 0);
  each_group(w, w.operand<uint32_t>(i, 2), mask, [&](Mask group) {
    T total = a[__builtin_ctz(group)];
    for (Mask rest = group & (group - 1); rest; rest &= rest - 1) total = Op{}(total, a[__builtin_ctz(rest)]);
    each_lane(group, [=](int l) { d[l] = total; });
  });
  return Step::next;
}
template <class Op, class T = uint32_t>
void bind_redux(Bind& b) {
  bind_operands(b, Type::b32, Type::b32, 2);
  b.collective();
  b.run(redux<Op, T>);
}

Step activemask(Warp& w, const Instruction& i, Mask mask) {
  each_lane(mask, [d = w.operand<uint32_t>(i, 0), mask](int l) { d[l] = mask; });
  return Step::next;
}

// Operands: d or _, p, membermask. The leader is the lowest lane, as the ISA wants the same one every time.
Step elect(Warp& w, const Instruction& i, Mask mask) {
  each_group(w, w.operand<uint32_t>(i, 2), mask, [&](Mask group) {
    const uint32_t leader = __builtin_ctz(group);
    if (i.operand[0] != kSink) each_lane(group, [d = w.operand<uint32_t>(i, 0), leader](int l) { d[l] = leader; });
    put(w, i.operand[1], Mask{1} << leader, group);
  });
  return Step::next;
}
void bind_elect(Bind& b) {
  expect_operands(b, 2);
  const Operand& d = b.operand(0);
  if (d.kind != Operand::Kind::pair) b.refuse("its destination must be d|p");
  b.destination(d.parts[0], Type::b32);
  destination(b, d.parts[1], Type::pred);
  b.source(1, Type::b32);
  b.collective();
  b.run(elect);
}

Step nanosleep(Warp&, const Instruction&, Mask) { return Step::yielded; }
Step trap(Warp& w, const Instruction&, Mask mask) { w.fail(Kind::illegal, "trap", __builtin_ctz(mask)); }
Step breakpoint(Warp& w, const Instruction&, Mask mask) { w.fail(Kind::illegal, "breakpoint", __builtin_ctz(mask)); }
Step nothing(Warp&, const Instruction&, Mask) { return Step::next; }

const Row rows[] = {
    {"shfl.sync.up|down|bfly|idx.b32", "9.7.9.6", bind_shfl},
    {"vote.sync.all|any|uni.pred", "9.7.13.8", bind_vote},
    {"vote.sync.ballot.b32", "9.7.13.8", bind_vote},
    {"vote.ballot.sync.b32", "9.7.13.8", bind_vote},  // as CUB spells it, and ptxas takes it
    {"match.any|all.sync.b32|b64", "9.7.13.9", bind_match},
    {"activemask.b32", "9.7.13.10",
     [](Bind& b) {
       bind_operands(b, Type::b32, Type::none, 0);
       b.run(activemask);
     }},
    {"redux.sync.add.u32|s32", "9.7.13.11", bind_redux<Sum>},
    {"redux.sync.min.u32", "9.7.13.11", bind_redux<Least>},
    {"redux.sync.min.s32", "9.7.13.11", bind_redux<Least, int32_t>},
    {"redux.sync.max.u32", "9.7.13.11", bind_redux<Greatest>},
    {"redux.sync.max.s32", "9.7.13.11", bind_redux<Greatest, int32_t>},
    {"redux.sync.and.b32", "9.7.13.11", bind_redux<Every>},
    {"redux.sync.or.b32", "9.7.13.11", bind_redux<Some>},
    {"redux.sync.xor.b32", "9.7.13.11", bind_redux<Odd>},
    {"elect.sync", "9.7.13.13", bind_elect},
    {"brkpt", "9.7.19.1",
     [](Bind& b) {
       expect_operands(b, 0);
       b.run(breakpoint);
     }},
    {"nanosleep.u32", "9.7.19.2",
     [](Bind& b) {
       expect_operands(b, 1);
       b.source(0, Type::u32);
       b.run(nanosleep);
     }},
    {"pmevent.mask?", "9.7.19.3",
     [](Bind& b) {
       expect_operands(b, 1);
       b.constant(b.operand(0));
       b.run(nothing);
     }},
    {"trap", "9.7.19.4",
     [](Bind& b) {
       expect_operands(b, 0);
       b.run(trap);
     }},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
