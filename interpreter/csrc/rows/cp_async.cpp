// cp.async, its groups, and the mbarriers that follow it (ISA 9.7.9.25.3, 9.7.13.15.15). In the generic proxy: to the
// race check a copy is a write of the warp that issued it, made when the copy is waited for.
#include <algorithm>
#include <deque>
#include <iterator>
#include <utility>

#include "../mbarrier.h"
#include "../table.h"
#include "../timeline_trace.h"
#include "async.h"

namespace gpuless {
namespace {

// The copies of one instruction by lanes that have committed as many groups.
struct Copy final : Pending {
  Mask issued = 0;
  uint64_t group = 0;  // of each of its lanes
  uint32_t bytes = 0;
  uint8_t* from[kLanes];
  uint64_t to[kLanes];
  uint8_t read[kLanes];  // bytes; the rest is zeros
  Mask in_flight = 0;    // lanes that have not waited
  struct Landing {       // as whose write what some of the others have copied counts, and when it was made
    Mask lanes;
    int agent;
    Clock now;
  };
  std::vector<Landing> landed;

  void complete(Cta& cta) override {
    uint8_t* memory = cta.shared.data();
    if (bytes == 16) return copy<16>(memory);
    if (bytes == 8) return copy<8>(memory);
    copy<4>(memory);
  }
  template <uint32_t size>  // a constant: memcpy is one move
  void copy(uint8_t* memory) const {
    for (Mask rest = issued; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      uint8_t* out = memory + to[l];
      if (read[l] == size) {
        std::memcpy(out, from[l], size);
      } else {
        std::memset(out, 0, size);
        if (read[l]) std::memcpy(out, from[l], read[l]);
      }
    }
  }
  // f(begin, bytes, lanes) over the destinations of some lanes, neighbours in one call.
  template <class F>
  void ranges(Mask lanes, F f) const {
    while (lanes) {
      const int first = __builtin_ctz(lanes);
      int l = first;
      for (lanes &= lanes - 1; lanes && __builtin_ctz(lanes) == l + 1 && to[l + 1] == to[l] + bytes; ++l) {
        lanes &= lanes - 1;
      }
      f(static_cast<uint32_t>(to[first]), (l - first + 1) * bytes, (kAllLanes >> (kLanes - 1 - l + first)) << first);
    }
  }
  // What lands becomes known to the thread that waits, and to no other of its warp (ISA 9.7.9.25.3.3).
  void land(Cta& cta, const Actor& actor, Mask lanes) {
    cta.cluster->complete(*this);
    in_flight &= ~lanes;
    landed.push_back({lanes, actor.agent, actor.now});
    if (!checked(cta)) return;
    // The ISA has bulk copies alone in the async proxy, so that wgmma and TMA may read what has landed only behind a
    // fence.proxy.async after the wait. Triton 3.7.1 emits one; CUTLASS 4.2 does not
    // (sm90_mma_multistage_gmma_ss_warpspecialized.hpp), so it is a finding by the letter of the ISA.
    Actor a = acting(*this, actor);
    a.proxy = Proxy::copy;
    a.lanes = cta.warps[warp].lanes(__builtin_ctz(bytes));
    if (bytes == 16) return cta.shadow.land_granules(a, to, lanes);
    ranges(lanes, [&](uint32_t begin, uint32_t n, Mask lanes) {
      a.lanes.place(begin, {lanes, true});
      cta.shadow.land(a, begin, n);
    });
  }
};

}  // namespace

struct CpAsync {
  uint64_t committed[kLanes] = {};            // groups of each lane
  std::vector<std::shared_ptr<Copy>> copies;  // in flight, in order
  std::deque<std::shared_ptr<Copy>> spare;    // were in flight: they serve again
  Knowledge arrived;                          // of the copies whose mbarriers took them in

  // Of the lanes those that have committed a group, and `keep` more.
  Mask past(Mask lanes, uint64_t group, uint64_t keep) const {
    Mask past = 0;
    for (int l = 0; l < kLanes; ++l) past |= Mask{group + keep < committed[l]} << l;
    return past & lanes;
  }
  void forget() {
    const auto over = std::stable_partition(copies.begin(), copies.end(), [](const auto& c) { return c->in_flight; });
    spare.insert(spare.end(), std::make_move_iterator(over), std::make_move_iterator(copies.end()));
    copies.erase(over, copies.end());
  }
  std::shared_ptr<Copy> make() {
    if (spare.empty()) return std::make_shared_for_overwrite<Copy>();
    auto c = std::move(spare.front());
    spare.pop_front();
    if (c.use_count() > 1) return std::make_shared_for_overwrite<Copy>();  // what follows an mbarrier may still have it
    c->done = false;
    c->landed.clear();
    return c;
  }
};

namespace {

CpAsync& state_of(Warp& w) {
  if (!w.cp_async) w.cp_async = std::make_shared<CpAsync>();
  return *w.cp_async;
}

struct Form {
  Place to, from;
  uint32_t bytes = 0;
  enum class Limit : uint8_t { none, size, ignore } limit = Limit::none;
  Mask flip = 0;  // of the ignore-src predicate
};

// All at once where they are as they should be, else one after the other.
void find_destinations(Warp& w, const Form& form, Mask mask, const uint64_t address[kLanes], uint64_t to[kLanes]) {
  const uint64_t window = form.to.generic ? kSharedWindow : 0, first = address[__builtin_ctz(mask)] - window;
  uint64_t highest = 0, ones = 0;
  for (int l = 0; l < kLanes; ++l) {
    to[l] = mask >> l & 1 ? address[l] - window : first;
    highest = std::max(highest, to[l]);
    ones |= to[l];
  }
  const uint64_t size = w.cta->shared.size();
  if (ones % form.bytes == 0 && highest < size && form.bytes <= size - highest) return;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    to[l] = shared_offset(w, form.to, address[l], form.bytes, form.bytes, l, "the destination of cp.async");
  }
}

Step copy(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Form*>(i.data);
  Cta& cta = *w.cta;
  uint64_t to[kLanes], from[kLanes];
  form.to.read(w, i, to);
  form.from.read(w, i, from);

  CpAsync& state = state_of(w);
  const auto issued = state.make();
  Copy& all = *issued;
  all.bytes = form.bytes;
  Mask whole = mask;  // lanes that read all of their source
  std::fill(std::begin(all.read), std::end(all.read), static_cast<uint8_t>(form.bytes));
  if (form.limit == Form::Limit::ignore) {
    const Mask ignored = (w.predicate(i.operand[2]) ^ form.flip) & mask;
    whole &= ~ignored;
    for (Mask rest = ignored; rest; rest &= rest - 1) all.read[__builtin_ctz(rest)] = 0;
  } else if (form.limit == Form::Limit::size) {
    const auto* size = w.operand<uint32_t>(i, 2);
    Mask partial = 0;
    for (int l = 0; l < kLanes; ++l) partial |= Mask{size[l] != form.bytes} << l;
    partial &= mask;
    whole &= ~partial;
    for (Mask rest = partial; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      if (size[l] > form.bytes) {
        w.fail(Kind::illegal,
               "src-size is " + std::to_string(size[l]) + ", more than cp-size, " + std::to_string(form.bytes), l);
      }
      all.read[l] = static_cast<uint8_t>(size[l]);
    }
  }
  Count* const count = std::exchange(w.count, nullptr);  // below, as all of its lanes make one request
  if (whole) access(w, ptx::Space::global, from, static_cast<int>(form.bytes), Use::read, whole, all.from);
  for (Mask rest = mask & ~whole; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    if (!all.read[l]) continue;
    if (from[l] % form.bytes) w.fail_at(Kind::misaligned, "the source must be aligned to cp-size", l, from[l]);
    all.from[l] = access_global(w, from[l], all.read[l], Use::read, l);
  }
  find_destinations(w, form, mask, to, all.to);
  // The source is far away, for the host as well, and nobody needs it soon.
  for (Mask rest = whole; rest; rest &= rest - 1) __builtin_prefetch(all.from[__builtin_ctz(rest)]);
  if ((w.count = count)) {
    Mask reading = 0;
    uint64_t bytes = 0;
    for (Mask rest = mask; rest; rest &= rest - 1) {
      const int l = __builtin_ctz(rest);
      if (all.read[l]) reading |= Mask{1} << l;
      bytes += all.read[l];
    }
    count_global(w, from, bytes, Use::read, reading);
    count_shared(w, all.to, static_cast<int>(form.bytes), Use::write, mask);
  }
  if (checked(cta)) {
    Actor actor = w.actor();
    actor.lanes = w.lanes(__builtin_ctz(form.bytes));
    if (form.bytes == 16) {
      cta.shadow.take_off_granules(actor, all.to, mask);
      for (Mask rest = mask; rest; rest &= rest - 1) {
        std::memset(cta.shared.data() + all.to[__builtin_ctz(rest)], kPoison, 16);
      }
    } else {
      all.ranges(mask, [&](uint32_t begin, uint32_t n, Mask lanes) {
        actor.lanes.place(begin, {lanes, true});
        cta.shadow.take_off(actor, begin, n);
        std::memset(cta.shared.data() + begin, kPoison, n);
      });
    }
  }
  all.instruction = &i;
  all.code = w.frame->code;
  all.warp = w.id;
  for (Mask rest = mask; rest;) {
    const uint64_t group = state.committed[__builtin_ctz(rest)];
    Mask same = 0;
    for (int l = 0; l < kLanes; ++l) same |= Mask{state.committed[l] == group} << l;
    same &= rest;
    rest &= ~same;
    auto one = rest ? std::make_shared<Copy>(all) : issued;
    one->issued = one->in_flight = same;
    one->group = group;
    state.copies.push_back(one);
    cta.add(std::move(one));
  }
  return Step::next;
}

Step commit_group(Warp& w, const Instruction&, Mask mask) {
  CpAsync& state = state_of(w);
  for (Mask rest = mask; rest; rest &= rest - 1) ++state.committed[__builtin_ctz(rest)];
  return Step::next;
}

// Waits for all groups of each lane but the last `keep`.
void wait(Warp& w, Mask mask, uint64_t keep) {
  CpAsync& state = state_of(w);
  for (const auto& c : state.copies) {
    if (const Mask landed = state.past(c->in_flight & mask, c->group, keep)) {
      c->land(*w.cta, w.actor(), landed);
    } else if ((c->in_flight & mask) == mask) {
      break;  // what its lanes have issued later is in no earlier group
    }
  }
  state.forget();
  w.acquire(mask, state.arrived);
}

Step wait_group(Warp& w, const Instruction& i, Mask mask) {
  wait(w, mask, i.immediate);
  return Step::next;
}

// "equivalent to cp.async.commit_group; cp.async.wait_group 0"
Step wait_all(Warp& w, const Instruction& i, Mask mask) {
  commit_group(w, i, mask);
  wait(w, mask, 0);
  return Step::next;
}

// An arrival at one mbarrier once all that its lanes have issued so far is there.
struct Arrival final : Pending {
  std::vector<std::shared_ptr<Copy>> copies;
  Mask lanes = 0;
  uint32_t mbarrier = 0;
  int series = 0;

  void complete(Cta& cta) override {
    CpAsync& state = *cta.warps[warp].cp_async;
    const Actor actor = completing(*this, series, Proxy::generic);
    Knowledge completion = learnt(series, actor.now);
    for (const auto& c : copies) {
      if (const Mask landing = c->in_flight & lanes) c->land(cta, actor, landing);
      // a later arrival may have been there first (CUTLASS's blockwise scales, two stages ahead)
      for (const Copy::Landing& l : c->landed)
        if (l.lanes & lanes) completion.join(learnt(l.agent, l.now));
    }
    state.forget();
    state.arrived.join(completion);
    for (Mask rest = lanes; rest; rest &= rest - 1) {
      MBarrier& b = mbarrier_at(cta, mbarrier);
      b.gathering.join(completion);
      b.arrive(cta, 1);
    }
  }
};

template <bool noinc>
Step arrive(Warp& w, const Instruction& i, Mask mask) {
  const auto& place = *static_cast<const Place*>(i.data);
  uint64_t address[kLanes];
  place.read(w, i, address);
  CpAsync& state = state_of(w);
  for (Mask left = mask; left;) {
    auto a = std::make_shared<Arrival>();
    a->instruction = &i;
    a->code = w.frame->code;
    a->warp = w.id;
    a->copies = state.copies;
    a->lanes = equal_lanes(address, left);
    left &= ~a->lanes;
    const int first = __builtin_ctz(a->lanes);
    a->mbarrier = shared_offset(w, place, address[first], 8, 8, first, "an mbarrier");
    MBarrier& b = use_mbarrier(w, *w.cta, a->mbarrier);
    const int count = __builtin_popcount(a->lanes);
    if (w.trace) w.trace->signal(Signal::Kind::copies, *w.cta, b, count, noinc ? 0 : count);
    if (!noinc) b.touch(*w.cta, Touch::expect);
    if (!noinc && (b.pending += count) > MBarrier::kMaxCount) {
      w.fail_at(Kind::mbarrier, "the pending count passes 2^20 - 1", first, b.address);
    }
    a->series = w.cta->arrivals_at(a->mbarrier);
    w.cta->add(std::move(a));
  }
  return Step::next;
}

template <bool noinc>
void bind_arrive(Bind& b) {
  if (b.operands() != 1) b.refuse("expected [address]");
  auto& place = b.data<Place>();
  place.displacement = b.address(b.operand(0), &place.wide);
  place.generic = !b.has("shared") && !b.has("shared::cta");
  b.run(&arrive<noinc>);
}

// [dst], [src], cp-size {, src-size or ignore-src} {, cache-policy}. The policy has no effect on what is copied.
void bind_copy(Bind& b) {
  const int policy = b.has("L2::cache_hint") ? 1 : 0, count = b.operands() - policy;
  if (count != 3 && count != 4) {
    b.refuse("expected [dst], [src], cp-size, maybe src-size or ignore-src, and with .L2::cache_hint a cache-policy");
  }
  auto& form = b.data<Form>();
  form.to.operand = 0;
  form.to.displacement = b.address(b.operand(0), &form.to.wide);
  form.from.operand = 1;
  form.from.displacement = b.address(b.operand(1), &form.from.wide);
  const int64_t bytes = b.constant(b.operand(2));
  if (bytes != 16 && (b.has("cg") || (bytes != 4 && bytes != 8))) {
    b.refuse(b.has("cg") ? "cp.async.cg copies 16 bytes" : "cp.async.ca copies 4, 8 or 16 bytes");
  }
  form.bytes = static_cast<uint32_t>(bytes);
  if (count == 4) {
    const Operand& limit = b.operand(3);
    if (limit.kind == Operand::Kind::reg && b.code.source->registers[limit.id] == Type::pred) {
      form.limit = Form::Limit::ignore;
      form.flip = b.predicate(limit) ? kAllLanes : 0;
    } else {
      form.limit = Form::Limit::size;
      b.source(limit, Type::b32);
    }
  }
  if (policy) b.source(b.operands() - 1, Type::b64);
  b.run(&copy);
}

const Row rows[] = {
    {"cp.async.ca|cg.shared|shared::cta.global.L2::cache_hint?.L2::64B|L2::128B|L2::256B?", "9.7.9.25.3.1", bind_copy},
    {"cp.async.commit_group", "9.7.9.25.3.2", [](Bind& b) { b.run(&commit_group); }},
    {"cp.async.wait_group", "9.7.9.25.3.3",
     [](Bind& b) {
       const int64_t n = b.operands() == 1 ? b.constant(b.operand(0)) : -1;
       if (n < 0) b.refuse("expected the number of groups that may stay under way");
       b.instruction.immediate = static_cast<uint64_t>(n);
       b.run(&wait_group);
     }},
    {"cp.async.wait_all", "9.7.9.25.3.3", [](Bind& b) { b.run(&wait_all); }},
    {"cp.async.mbarrier.arrive.noinc.shared|shared::cta?.b64", "9.7.13.15.15", bind_arrive<true>},
    {"cp.async.mbarrier.arrive.shared|shared::cta?.b64", "9.7.13.15.15", bind_arrive<false>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
