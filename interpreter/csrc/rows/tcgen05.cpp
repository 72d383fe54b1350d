// tcgen05: allocation, order and completion (ISA 9.7.16.7, 9.7.16.8, 9.7.16.11). Its fences have no effect: what a
// barrier orders it orders for tensor memory too.
#include "rows/tcgen05.h"

#include <algorithm>
#include <utility>

#include "mbarrier.h"
#include "rows/async.h"
#include "rows/matrix_descriptor.h"
#include "rows/matrix_rows.h"
#include "undefined.h"

namespace gpuless {

Tcgen05& tcgen05_of(Warp& w) {
  if (!w.tcgen05) w.tcgen05 = std::make_shared<Tcgen05>();
  return *w.tcgen05;
}

Actor TensorOperation::actor(Proxy proxy) const {
  return acting(*this, Actor{queue->series, now, &knowledge, proxy, 0, {}});
}

void issue(Warp& w, const Instruction& i, std::shared_ptr<TensorOperation> operation) {
  Tcgen05& state = tcgen05_of(w);
  Cluster& cluster = *w.cta->cluster;
  cluster.begin_series(state.series);
  operation->instruction = &i;
  operation->code = w.frame->code;
  operation->warp = w.id;
  operation->queue = w.tcgen05;
  operation->number = ++state.issued;
  operation->now = cluster.advance(state.series);
  state.history.join(w.knowledge);
  state.history.seen.set(state.series, operation->now);
  operation->knowledge = state.history;
  w.release();
  w.cta->add(std::move(operation));
}

CtaGroup group_of(const Warp& w, bool pair) {
  if (!pair) return {{w.cta, nullptr}, 1};
  const auto& ctas = w.cta->cluster->ctas;
  const size_t even = w.cta->rank & ~1, size = w.cta->launch->cluster_size();
  if (even + 1 >= size) {
    w.fail(Kind::illegal, "cta_group::2 needs a pair of CTAs, and the cluster has " + std::to_string(size));
  }
  return {{ctas[even].get(), ctas[even + 1].get()}, 2};
}

void require_descriptor(const Warp& w, uint64_t bits, const char* what, int lane) {
  const char* const why = illegal_descriptor(bits, true);
  if (why) w.fail(Kind::illegal, std::string(what) + " " + hexadecimal(bits) + " is illegal: " + why, lane);
}

// ---- Loads ----

Actor Loads::begin(const Warp& w, const Offset* registers, int count) {
  if (unknown_ && frame_ != w.frame) {
    w.fail(Kind::unsupported, "tcgen05.ld under way across a function call: wait for it within the function");
  }
  frame_ = w.frame;
  const size_t n = std::find_if(loads_.begin(), loads_.end(), [](const Load& l) { return l.known; }) - loads_.begin();
  if (n == loads_.size()) loads_.push_back({-1, 0, true});
  w.cta->cluster->begin_series(loads_[n].series);
  const Actor actor = w.cta->cluster->issued(w, loads_[n].series, Proxy::generic);
  loads_[n].now = actor.now;
  loads_[n].known = false;
  ++unknown_;
  std::replace(by_register_.begin(), by_register_.end(), static_cast<uint16_t>(n + 1), uint16_t{0});
  for (int r = 0; r < count; ++r) {
    if (registers[r] == kSink) continue;
    if (registers[r] / 64 >= by_register_.size()) by_register_.resize(registers[r] / 64 + 1);
    by_register_[registers[r] / 64] = static_cast<uint16_t>(n + 1);
  }
  return actor;
}

void Loads::learn(Warp& w, Load& load) {
  if (load.known) return;
  load.known = true;
  --unknown_;
  w.knowledge.join(learnt(load.series, load.now));
}

void Loads::over(Warp& w) {
  for (Load& load : loads_) learn(w, load);
}

void Loads::before(Warp& w, const Instruction& i) {
  if (w.frame != frame_) return;
  const auto load_of = [&](Offset o) { return o / 64 < by_register_.size() ? by_register_[o / 64] : 0; };
  for (int n = i.destinations; n < i.destinations + i.sources; ++n) {
    if (const int load = load_of(i.operand[n])) learn(w, loads_[load - 1]);
  }
  for (int n = 0; n < i.destinations; ++n) {
    if (i.operand[n] != kSink && load_of(i.operand[n])) by_register_[i.operand[n] / 64] = 0;
  }
}

namespace {

// ---- Allocation ----

struct Allocation {
  Place place;  // alloc: where the address goes
  bool pair = false;
};

TensorMemory& begun(Cta& cta) {
  if (!cta.has_tensor_memory) {
    if (!cta.tensor_memory) cta.tensor_memory = std::make_unique<TensorMemory>();
    cta.tensor_memory->begin(cta);
    cta.has_tensor_memory = true;
  }
  return *cta.tensor_memory;
}

// Of a pair a warp of each CTA allocates and frees, the n-th time of one together with the n-th of the other.
bool meets(Warp& w, bool pair) {
  if (!pair) return true;
  const CtaGroup group = group_of(w, true);
  TensorMemory& memory = begun(*w.cta);
  const TensorMemory& peer = begun(*group.ctas[group.ctas[0] == w.cta]);
  uint64_t& turn = w.strand().ticket;
  if (!turn) {
    turn = ++memory.pair_turns;
    w.cta->cluster->happened();
  }
  if (peer.pair_turns < turn) return false;
  turn = 0;
  return true;
}

uint32_t columns_of(const Warp& w, uint32_t columns) {
  if (columns < 32 || columns > TensorMemory::kColumns || (columns & (columns - 1))) {
    w.fail(Kind::illegal, "the number of columns is 32, 64, 128, 256 or 512, not " + std::to_string(columns));
  }
  return columns;
}

Step alloc(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const auto& form = *static_cast<const Allocation*>(i.data);
  const uint32_t columns = columns_of(w, w.operand<uint32_t>(i, 1)[0]);
  TensorMemory& memory = begun(*w.cta);
  if (!memory.may_allocate) {
    w.fail(Kind::illegal, "tcgen05.alloc after the CTA's tcgen05.relinquish_alloc_permit");
  }
  if (!meets(w, form.pair)) return Step::blocked;
  const int first = memory.allocate(columns, w.frame->code, i.index);
  if (first < 0) return Step::blocked;  // until another warp frees some
  w.acquire(kAllLanes, memory.released);
  uint64_t address[kLanes];
  form.place.read(w, i, address);
  const uint32_t place = shared_offset(w, form.place, address[0], 4, 4, 0, "where tcgen05.alloc puts the address");
  std::memcpy(w.cta->shared.data() + place, &first, 4);
  if (checked(*w.cta)) {
    w.cta->shadow.write(w.actor(), place, 4);
    w.cta->shadow.land(w.actor(Proxy::async), place, 4);  // needs no fence.proxy.async before TMA writes there
  }
  return Step::next;
}

Step dealloc(Warp& w, const Instruction& i, Mask mask) {
  require_whole_warp(w, mask);
  const auto& form = *static_cast<const Allocation*>(i.data);
  const uint32_t columns = columns_of(w, w.operand<uint32_t>(i, 1)[0]);
  const TensorAddress first(w.operand<uint32_t>(i, 0)[0]);
  TensorMemory& memory = tensor_memory(*w.cta);
  if (!meets(w, form.pair)) return Step::blocked;
  memory.release(first.column, columns);
  if (checked(*w.cta)) {  // who uses it must have come to an end
    memory.access(w.actor(), 0, TensorMemory::kRows, first.column, columns, Use::write);
    memory.forget(first.column, columns);
  }
  memory.released.join(w.knowledge);
  w.release();
  w.cta->cluster->happened();
  return Step::next;
}

Step relinquish(Warp& w, const Instruction&, Mask mask) {
  require_whole_warp(w, mask);
  begun(*w.cta).may_allocate = false;
  return Step::next;
}

// ---- Order and completion ----

Step no_effect(Warp&, const Instruction&, Mask) { return Step::next; }

template <bool loads>
Step wait(Warp& w, const Instruction&, Mask mask) {
  require_whole_warp(w, mask);
  if (!w.tcgen05) return Step::next;
  Tcgen05& state = *w.tcgen05;
  if (loads) {
    state.loads.over(w);
    update_watched(w);
  } else if (state.stored) {
    w.knowledge.join(learnt(state.stores, std::exchange(state.stored, 0)));
  }
  return Step::next;
}

struct Commit {
  Place place;
  int mask = -1;  // operand: the CTAs of a multicast
  bool pair = false;
};

struct CommitOperation final : TensorOperation {
  Cta* target = nullptr;
  uint32_t mbarrier = 0;

  void perform(Cta& cta) override {
    if (target != &cta) target->visited(actor(Proxy::async), false);
    MBarrier& b = mbarrier_at(*target, mbarrier);
    b.gathering.join(knowledge);
    b.arrive(*target, 1);
  }
};

Step commit(Warp& w, const Instruction& i, Mask mask) {
  const auto& form = *static_cast<const Commit*>(i.data);
  uint64_t address[kLanes];
  form.place.read(w, i, address);
  for (Mask rest = mask; rest; rest &= rest - 1) {
    const int l = __builtin_ctz(rest);
    const SharedRange place = shared_at(w, form.place, address[l], 8, 8, l, "an mbarrier");
    group_of(w, form.pair);
    const auto& ctas = w.cta->cluster->ctas;
    const uint64_t size = w.cta->launch->cluster_size();
    const unsigned named = form.mask < 0 ? 1u << place.cta->rank : w.operand<uint16_t>(i, form.mask)[l];
    if (!named || named >> size) {
      w.fail(Kind::illegal,
             "the multicast's mask is " + hexadecimal(named) + ": it must name CTAs of the cluster, which has " +
                 std::to_string(size),
             l);
    }
    for (unsigned left = named; left; left &= left - 1) {
      auto operation = std::make_shared<CommitOperation>();
      operation->target = ctas[__builtin_ctz(left)].get();
      operation->mbarrier = place.offset;
      use_mbarrier(w, *operation->target, place.offset, false);
      issue(w, i, std::move(operation));
    }
  }
  return Step::next;
}

// ---- Binding ----

template <Handler handler>
void bind_plain(Bind& b) {
  require_targets(b, {100});
  if (b.operands()) b.refuse("expected no operands");
  b.run(handler);
}

void bind_alloc(Bind& b) {
  require_targets(b, {100});
  if (b.operands() != 2) b.refuse("expected [dst], columns");
  auto& form = b.data<Allocation>();
  form.pair = b.has("cta_group::2");
  form.place.displacement = b.address(b.operand(0), &form.place.wide);
  form.place.generic = !b.has("shared::cta");
  b.source(1, Type::b32);
  b.collective();
  b.run(&alloc);
}

void bind_dealloc(Bind& b) {
  require_targets(b, {100});
  if (b.operands() != 2) b.refuse("expected taddr, columns");
  b.data<Allocation>().pair = b.has("cta_group::2");
  b.source(0, Type::b32);
  b.source(1, Type::b32);
  b.collective();
  b.run(&dealloc);
}

void bind_commit(Bind& b) {
  require_targets(b, {100});
  auto& form = b.data<Commit>();
  const bool multicast = b.has("multicast::cluster");
  if (b.operands() != (multicast ? 2 : 1)) b.refuse("expected [mbarrier], with .multicast::cluster a mask of CTAs");
  form.pair = b.has("cta_group::2");
  form.place.displacement = b.address(b.operand(0), &form.place.wide);
  form.place.generic = !b.has("shared::cluster");
  form.place.cluster = true;
  if (multicast) {
    form.mask = b.instruction.sources;
    b.source(1, Type::b16);
  }
  b.run(&commit);
}

#define GROUP "cta_group::1|cta_group::2"
const Row rows[] = {
    {"tcgen05.alloc." GROUP ".sync.aligned.shared::cta?.b32", "9.7.16.7", bind_alloc},
    {"tcgen05.dealloc." GROUP ".sync.aligned.b32", "9.7.16.7", bind_dealloc},
    {"tcgen05.relinquish_alloc_permit." GROUP ".sync.aligned", "9.7.16.7", bind_plain<&relinquish>},
    {"tcgen05.wait::ld.sync.aligned", "9.7.16.8", bind_plain<&wait<true>>},
    {"tcgen05.wait::st.sync.aligned", "9.7.16.8", bind_plain<&wait<false>>},
    {"tcgen05.fence::before_thread_sync|fence::after_thread_sync", "9.7.16.11", bind_plain<&no_effect>},
    {"tcgen05.commit." GROUP ".mbarrier::arrive::one.shared::cluster?.multicast::cluster?.b64", "9.7.16.12",
     bind_commit},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
