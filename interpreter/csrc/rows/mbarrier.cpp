// mbarrier.* (ISA 9.7.13.15), but for cp.async.mbarrier.arrive, which is in cp_async.cpp.
#include "../mbarrier.h"

#include "../explore/execution.h"
#include "../lanes.h"
#include "../table.h"
#include "../timeline_trace.h"
#include "async.h"

namespace gpuless {

void MBarrier::settle(Cta& cta) {
  if (pending || transactions) return;
  if (Execution* e = cta.launch->execution) e->completed(mbarrier_object(cta, address), phase);
  ++phase;
  pending = expected;
  completed = gathering;
  gathering = Knowledge();
  cta.cluster->happened();
}

void MBarrier::touch(Cta& cta, Touch how) const {
  if (Execution* e = cta.launch->execution) e->phase(mbarrier_object(cta, address), phase, how);
}

void MBarrier::arrive(Cta& cta, uint32_t count, bool drop) {
  touch(cta, Touch::arrive);
  if (count == 0 || count > kMaxCount) {
    fault(Kind::mbarrier, "an arrival must count 1 to 2^20 - 1, this one counts " + std::to_string(count), address);
  }
  if (count > pending) {
    fault(Kind::mbarrier,
          "too many arrivals: the phase lacks " + std::to_string(pending) + " of " + std::to_string(expected) +
              ", and " + std::to_string(count) + " arrive" +
              (pending || !transactions ? "" : " (it is waiting for " + std::to_string(transactions) + " bytes)"),
          address);
  }
  pending -= count;
  if (drop) expected -= count;
  settle(cta);
}

void MBarrier::expect_transactions(Cta& cta, int64_t bytes) {
  transactions += bytes;
  if (transactions > kMaxCount || transactions < -kMaxCount) {
    fault(Kind::mbarrier, "the tx-count must stay within 2^20 - 1 bytes, this makes it " + std::to_string(transactions),
          address);
  }
  if (bytes) settle(cta);
}

void MBarrier::complete_transactions(Cta& cta, int64_t bytes) {
  touch(cta, Touch::arrive);
  expect_transactions(cta, -bytes);
}

MBarrier& mbarrier_at(Cta& cta, uint32_t address) {
  const auto entry = cta.mbarriers.find(address);
  if (entry == cta.mbarriers.end()) {
    fault(Kind::mbarrier, "there is no mbarrier here: mbarrier.init has not run, or mbarrier.inval has", address);
  }
  return *entry->second;
}

MBarrier& use_mbarrier(Warp& w, Cta& cta, uint32_t address, bool released) {
  MBarrier& b = mbarrier_at(cta, address);
  if (&cta != w.cta) cta.visited(w.actor(), released);
  if (checked(cta)) cta.shadow.use_mbarrier(w.actor(), address, b.published && w.cluster_phases >= b.published);
  return b;
}

namespace {

struct Form {
  Place place;
  bool acquire_release = true;  // not .relaxed
  bool within_cta = false;      // .cta; with no scope it counts for all of the cluster, as CUTLASS has it
  bool parity = false;
  bool counted = false;  // a count operand follows the address
};

// The mbarriers that the lanes of an instruction name, most often one.
class Objects {
 public:
  Objects(Warp& w, const Instruction& i, const Place& place, bool released = false)
      : w_(w), place_(place), released_(released) {
    place.read(w, i, addresses_);
  }

  SharedRange range(int lane) const { return shared_at(w_, place_, addresses_[lane], 8, 8, lane, "an mbarrier"); }
  MBarrier& operator[](int lane) {
    if (!last_ || addresses_[lane] != last_address_) {
      last_address_ = addresses_[lane];
      const SharedRange place = range(lane);
      cta_ = place.cta;
      last_ = &use_mbarrier(w_, *cta_, place.offset, released_);
    }
    return *last_;
  }
  Cta& cta() const { return *cta_; }  // of the last one

 private:
  Warp& w_;
  const Place& place_;
  const bool released_;
  uint64_t addresses_[kLanes];
  uint64_t last_address_ = 0;
  Cta* cta_ = nullptr;
  MBarrier* last_ = nullptr;
};

const Form& form_of(const Instruction& i) { return *static_cast<const Form*>(i.data); }

// The state of an object as an opaque value: whose, of which phase, and the arrivals it lacked.
constexpr uint64_t kStateTag = uint64_t{0x5} << 60;
constexpr uint64_t kPhaseBits = 20;
uint64_t state_of(const MBarrier& b) {
  return kStateTag | (b.phase & ((1 << kPhaseBits) - 1)) << 40 | uint64_t{b.address / 8} << 20 | b.pending;
}

Step init(Warp& w, const Instruction& i, Mask mask) {
  const Form& form = form_of(i);
  const auto* count = w.operand<uint32_t>(i, form.place.operand + 1);
  Objects objects(w, i, form.place);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const uint32_t offset = objects.range(l).offset;
    if (count[l] == 0 || count[l] > MBarrier::kMaxCount) {
      w.fail_at(Kind::mbarrier, "mbarrier.init takes a count of 1 to 2^20 - 1, not " + std::to_string(count[l]), l,
                offset);
    }
    auto& slot = w.cta->mbarriers[offset];
    if (slot && checked(*w.cta) && !w.cta->cluster->again(Kind::mbarrier, 0)) {
      Finding f = finding_at(Kind::mbarrier, "initialised again: mbarrier.inval must come first", offset);
      if (slot->untouched()) {
        f.breaks = Breaks::isa;
        f.message += kNobodyCame;
      }
      f.lane = l;
      w.cta->cluster->report(std::move(f));
    }
    slot = std::make_shared<MBarrier>(offset, count[l], w.agent);
    if (checked(*w.cta)) w.cta->shadow.set_mbarrier(w.actor(), offset, true);
  }
  return Step::next;
}

Step inval(Warp& w, const Instruction& i, Mask mask) {
  Objects objects(w, i, form_of(i).place);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const uint32_t offset = objects.range(l).offset;
    use_mbarrier(w, *w.cta, offset);
    if (checked(*w.cta)) w.cta->shadow.set_mbarrier(w.actor(), offset, false);
    w.cta->mbarriers.erase(offset);
  }
  return Step::next;
}

enum class Arrival { plain, drop, no_complete, expect };

// Two forms: the arrivals of one instruction share what their warp knows, so a phase takes it in once.
template <Arrival kind, bool dropping = kind == Arrival::drop>
Step arrive(Warp& w, const Instruction& i, Mask mask) {
  const Form& form = form_of(i);
  uint64_t* state = i.operand[0] == kSink ? nullptr : w.operand<uint64_t>(i, 0);
  const auto* count = form.counted ? w.operand<uint32_t>(i, form.place.operand + 1) : nullptr;
  Objects objects(w, i, form.place, form.acquire_release);
  const MBarrier* joined = nullptr;
  uint64_t phase = 0;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    MBarrier& b = objects[l];
    Cta& cta = objects.cta();
    if (state && &cta != w.cta) {
      w.fail_at(Kind::illegal, "an arrival at an mbarrier of another CTA gives no state: the destination must be _", l,
                b.address);
    }
    const bool releases = form.acquire_release && !(form.within_cta && &cta != w.cta);
    if (releases && (joined != &b || phase != b.phase)) {
      b.gathering.join(w.knowledge);
      joined = &b;
      phase = b.phase;
    }
    if (kind == Arrival::expect) b.expect_transactions(cta, count[l]);
    const uint32_t arrivals = kind != Arrival::expect && count ? count[l] : 1;
    if (kind == Arrival::no_complete && arrivals == b.pending && !b.transactions) {
      w.fail_at(Kind::mbarrier, "mbarrier.arrive.noComplete completes the phase", l, b.address);
    }
    if (state) state[l] = state_of(b);
    if (w.trace) {
      w.trace->signal(Signal::Kind::arrive, cta, b, arrivals, kind == Arrival::expect ? count[l] : 0);
    }
    b.arrive(cta, arrivals, dropping);
  }
  if (form.acquire_release) w.release();
  ++w.effects;
  return Step::next;
}

template <bool expect>
Step transactions(Warp& w, const Instruction& i, Mask mask) {
  const Form& form = form_of(i);
  const auto* bytes = w.operand<uint32_t>(i, form.place.operand + 1);
  Objects objects(w, i, form.place);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    MBarrier& b = objects[l];
    if (w.trace) w.trace->signal(Signal::Kind::arrive, objects.cta(), b, 0, expect ? bytes[l] : -bytes[l]);
    if (expect) b.touch(objects.cta(), Touch::expect);
    expect ? b.expect_transactions(objects.cta(), bytes[l]) : b.complete_transactions(objects.cta(), bytes[l]);
  }
  ++w.effects;
  return Step::next;
}

bool phase_over(const Warp& w, const Form& form, const Instruction& i, const MBarrier& b, int l) {
  if (form.parity) {
    const uint32_t parity = w.operand<uint32_t>(i, form.place.operand + 1)[l];
    if (parity > 1 && !w.cta->cluster->again(Kind::illegal, 0)) {
      Finding f = finding_at(Kind::illegal,
                             "the phase parity is 0 or 1, not " + std::to_string(static_cast<int32_t>(parity)) +
                                 "; hardware takes its lowest bit",
                             b.address);
      f.breaks = Breaks::isa;
      f.lane = l;
      w.cta->cluster->report(std::move(f));
    }
    return (b.phase & 1) != (parity & 1);
  }
  const uint64_t state = w.operand<uint64_t>(i, form.place.operand + 1)[l];
  if ((state & ~(~uint64_t{0} >> 4)) != kStateTag || (state >> 20 & 0xfffff) != b.address / 8) {
    w.fail_at(Kind::mbarrier, "the state is none that an arrival at this mbarrier returned", l, b.address);
  }
  const uint64_t behind = (b.phase - (state >> 40)) & ((1 << kPhaseBits) - 1);
  if (behind > 1) w.fail_at(Kind::mbarrier, "the state is of a phase before the preceding one", l, b.address);
  return behind == 1;
}

// A loop around a failing test makes no progress: after this many failures in a row, with no event, it counts as a
// wait.
constexpr int kPolls = 64;
// try_wait suspends its thread up to a time limit. The limit expires at one try in this many, and when nothing else can
// happen, as the phase need not end: CUTLASS tries a stage ahead that is never filled, and does not wait for it.
constexpr uint32_t kTimeout = 16;

template <bool suspends>
Step wait(Warp& w, const Instruction& i, Mask mask) {
  const Form& form = form_of(i);
  Objects objects(w, i, form.place);
  Mask over = 0;
  MBarrier* waited = nullptr;
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    MBarrier& b = objects[l];
    if (phase_over(w, form, i, b, l)) {
      over |= Mask{1} << l;
      if (waited != &b) b.touch(objects.cta(), form.parity ? Touch::wait : Touch::wait_token);
      if (w.trace) w.trace->signal(Signal::Kind::wait, objects.cta(), b, 0, 0);
      if (form.acquire_release && waited != &b) w.acquire(mask, b.completed);
      waited = &b;
    }
  }
  if (!over) {
    // Lanes that wait alone may be suspended, and look again when something has happened.
    const Cluster& cluster = *w.cta->cluster;
    if (suspends && cluster.idle_at != cluster.events) {
      if (w.random() % kTimeout || w.cta->launch->execution) return Step::blocked;
    } else if (!w.cta->launch->execution) {
      if (w.polled_at != cluster.events) w.polls = 0;
      w.polled_at = cluster.events;
      if (++w.polls > kPolls) return Step::blocked;
    }
  }
  if (over != mask && w.cta->launch->execution) {
    for (Mask rest = mask & ~over; rest; rest &= rest - 1)
      objects[__builtin_ctz(rest)].touch(objects.cta(), Touch::poll);
  }
  if (i.operand[0] != kSink) {
    Mask& result = *w.operand<Mask>(i, 0);
    result = (result & ~mask) | over;
  }
  return over == mask ? Step::next : Step::yielded;
}

Step pending_count(Warp& w, const Instruction& i, Mask mask) {
  return map<uint32_t, uint64_t>(w, i, mask, [](uint64_t state) { return static_cast<uint32_t>(state & 0xfffff); });
}

void address(Bind& b, Form& form, int operand) {
  form.place.operand = b.instruction.destinations;
  form.place.displacement = b.address(b.operand(operand), &form.place.wide);
  form.place.generic = !b.has("shared") && !b.has("shared::cta") && !b.has("shared::cluster");
  form.place.cluster = form.place.generic || b.has("shared::cluster");
  form.acquire_release = !b.has("relaxed");
  form.within_cta = b.has("cta");
  const bool semantics = b.has("acquire") || b.has("release") || b.has("relaxed");
  if (semantics != (b.has("cta") || b.has("cluster"))) b.refuse("semantics and scope come together, as .release.cta");
}

// state, [address] {, count}
template <Arrival kind, bool count_required = kind == Arrival::no_complete || kind == Arrival::expect>
void bind_arrive(Bind& b) {
  if (b.operands() != 3 && (count_required || b.operands() != 2)) {
    b.refuse(count_required ? "expected state, [address], count" : "expected state, [address] and maybe a count");
  }
  auto& form = b.data<Form>();
  b.destination(0, Type::b64);
  address(b, form, 1);
  form.counted = b.operands() == 3;
  if (form.counted) b.source(2, Type::b32);
  b.run(&arrive<kind>);
}

template <bool expect>
void bind_transactions(Bind& b) {
  if (b.operands() != 2) b.refuse("expected [address], bytes");
  auto& form = b.data<Form>();
  address(b, form, 0);
  b.source(1, Type::b32);
  b.run(&transactions<expect>);
}

// done, [address], state or parity {, time hint}
template <bool suspends>
void bind_wait(Bind& b) {
  if (b.operands() != 3 && !(suspends && b.operands() == 4)) b.refuse("expected done, [address], state or parity");
  auto& form = b.data<Form>();
  b.destination(0, Type::pred);
  address(b, form, 1);
  form.parity = b.has("parity");
  b.source(2, form.parity ? Type::b32 : Type::b64);
  if (b.operands() == 4) b.source(3, Type::b32);
  b.run(&wait<suspends>);
}

// The modifiers of semantics and scope come before the state space in the ISA; ptxas takes complete_tx's behind it too,
// as CUTLASS writes them.
const Row rows[] = {
    {"mbarrier.init.shared|shared::cta?.b64", "9.7.13.15.9",
     [](Bind& b) {
       if (b.operands() != 2) b.refuse("expected [address], count");
       auto& form = b.data<Form>();
       address(b, form, 0);
       b.source(1, Type::b32);
       b.run(&init);
     }},
    {"mbarrier.inval.shared|shared::cta?.b64", "9.7.13.15.10",
     [](Bind& b) {
       if (b.operands() != 1) b.refuse("expected [address]");
       address(b, b.data<Form>(), 0);
       b.run(&inval);
     }},
    {"mbarrier.expect_tx.relaxed?.cta|cluster?.shared|shared::cta|shared::cluster?.b64", "9.7.13.15.11",
     bind_transactions<true>},
    {"mbarrier.complete_tx.relaxed?.cta|cluster?.shared|shared::cta|shared::cluster?.b64", "9.7.13.15.12",
     bind_transactions<false>},
    {"mbarrier.complete_tx.shared::cta|shared::cluster.relaxed.cta|cluster.b64", "9.7.13.15.12",
     bind_transactions<false>},
    {"mbarrier.arrive.expect_tx.release|relaxed?.cta|cluster?.shared|shared::cta|shared::cluster?.b64", "9.7.13.15.13",
     bind_arrive<Arrival::expect>},
    {"mbarrier.arrive.noComplete.release?.cta?.shared|shared::cta?.b64", "9.7.13.15.13",
     bind_arrive<Arrival::no_complete>},
    {"mbarrier.arrive.release|relaxed?.cta|cluster?.shared|shared::cta|shared::cluster?.b64", "9.7.13.15.13",
     bind_arrive<Arrival::plain>},
    {"mbarrier.arrive_drop.expect_tx.release|relaxed?.cta|cluster?.shared|shared::cta|shared::cluster?.b64",
     "9.7.13.15.14",
     [](Bind& b) {
       bind_arrive<Arrival::expect>(b);
       b.run(&arrive<Arrival::expect, true>);
     }},
    {"mbarrier.arrive_drop.noComplete.release?.cta?.shared|shared::cta?.b64", "9.7.13.15.14",
     [](Bind& b) {
       bind_arrive<Arrival::no_complete>(b);
       b.run(&arrive<Arrival::no_complete, true>);
     }},
    {"mbarrier.arrive_drop.release|relaxed?.cta|cluster?.shared|shared::cta|shared::cluster?.b64", "9.7.13.15.14",
     bind_arrive<Arrival::drop>},
    {"mbarrier.test_wait.parity?.acquire|relaxed?.cta|cluster?.shared|shared::cta?.b64", "9.7.13.15.16",
     bind_wait<false>},
    {"mbarrier.try_wait.parity?.acquire|relaxed?.cta|cluster?.shared|shared::cta?.b64", "9.7.13.15.16",
     bind_wait<true>},
    {"mbarrier.pending_count.b64", "9.7.13.15.17",
     [](Bind& b) {
       if (b.operands() != 2) b.refuse("expected count, state");
       b.destination(0, Type::b32);
       b.source(1, Type::b64);
       b.run(&pending_count);
     }},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
