// Fences (ISA 9.7.13.4), the barrier of a cluster (9.7.13.3), programmatic dependent launches (9.7.13.13), setmaxnreg
// (9.7.19.5). Memory is sequentially consistent here, so fences matter only where the async proxy is concerned.
#include "../table.h"
#include "async.h"

namespace forwardpass::interpreter {

// Of a cluster of one CTA. A thread arrives and then waits; arrivals of a warp's lanes are kept as masks.
struct ClusterBarrier {
  Mask arrived[kMaxWarps] = {};   // in this phase
  Mask released[kMaxWarps] = {};  // by the end of the phase before; they have not waited yet
  Knowledge gathering, completed;
};

namespace {

Step no_effect(Warp&, const Instruction&, Mask) { return Step::next; }

// Might order the CTA after others, together with a strong access of either side.
Step fence(Warp& w, const Instruction&, Mask) {
  w.cta->acquired = true;
  return Step::next;
}

// What the warp knows may be touched by the async proxy from here on; what it writes after this may not.
Step fence_proxy_async(Warp& w, const Instruction&, Mask) {
  w.knowledge.proxied.join(w.knowledge.seen);
  w.release();
  return Step::next;
}

template <Handler handler>
void bind_plain(Bind& b) {
  if (b.operands()) b.refuse("expected no operands");
  b.run(handler);
}
constexpr auto bind_no_effect = bind_plain<no_effect>;

// Of the CTA alone it orders no other one.
void bind_fence(Bind& b) {
  if (b.has("cta")) return bind_no_effect(b);
  bind_plain<fence>(b);
}

ClusterBarrier& state_of(Cta& cta) {
  if (!cta.cluster_barrier) cta.cluster_barrier = std::make_shared<ClusterBarrier>();
  return *cta.cluster_barrier;
}

// Threads that have exited are not waited for.
void settle(Cta& cta, ClusterBarrier& b) {
  for (const Warp& w : cta.warps) {
    if (w.live & ~b.arrived[w.id]) return;
  }
  for (int k = 0; k < kMaxWarps; ++k) {
    b.released[k] |= b.arrived[k];
    b.arrived[k] = 0;
  }
  b.completed = b.gathering;
  b.gathering = Knowledge();
  cta.happened();
}

template <bool release>
Step cluster_arrive(Warp& w, const Instruction&, Mask mask) {
  ClusterBarrier& b = state_of(*w.cta);
  if (const Mask twice = mask & (b.arrived[w.id] | b.released[w.id])) {
    w.fail(Kind::barrier, "barrier.cluster.arrive a second time, with no barrier.cluster.wait between",
           __builtin_ctz(twice));
  }
  b.arrived[w.id] |= mask;
  if (release) {
    b.gathering.join(w.knowledge);
    w.release();
  }
  settle(*w.cta, b);
  return Step::next;
}

Step cluster_wait(Warp& w, const Instruction&, Mask mask) {
  ClusterBarrier& b = state_of(*w.cta);
  if (const Mask early = mask & ~(b.arrived[w.id] | b.released[w.id])) {
    w.fail(Kind::barrier, "barrier.cluster.wait with no barrier.cluster.arrive before it", __builtin_ctz(early));
  }
  if (mask & b.arrived[w.id]) settle(*w.cta, b);  // others may have exited
  if (mask & b.arrived[w.id]) return Step::blocked;
  b.released[w.id] &= ~mask;
  w.knowledge.join(b.completed);
  return Step::next;
}

Step wait_for_grids(Warp& w, const Instruction&, Mask) {
  w.knowledge.seen.at[kGridAgent] = 1;
  return Step::next;
}

// "must be executed by all threads in a warpgroup": the n-th one of each of its warps is the same.
Step set_max_registers(Warp& w, const Instruction& i, Mask mask) {
  if (mask != w.live) w.fail(Kind::barrier, "setmaxnreg needs every thread of the warp, and part of it is here");
  w.register_changes.push_back(&i);
  const size_t n = w.register_changes.size();
  const int first = w.id / 4 * 4, last = std::min<int>(first + 4, static_cast<int>(w.cta->warps.size()));
  for (int k = first; k < last; ++k) {
    const auto& other = w.cta->warps[k].register_changes;
    if (other.size() >= n && other[n - 1] != &i) {
      w.fail(Kind::barrier,
             "setmaxnreg differs within a warpgroup: warp " + std::to_string(k) + " has executed another");
    }
  }
  return Step::next;
}

template <bool release>
void bind_cluster_arrive(Bind& b) {
  if (b.has("aligned")) b.collective();
  b.run(&cluster_arrive<release>);
}

// [map], 128
void bind_tensormap_acquire(Bind& b) {
  if (b.operands() != 2 || b.constant(b.operand(1)) != 128) b.refuse("expected [map], 128");
  bool wide;
  b.address(b.operand(0), &wide);
  b.run(&no_effect);
}

#define SCOPE "cta|cluster|gpu|sys"
const Row rows[] = {
    {"fence.sc|acq_rel|acquire|release?." SCOPE, "9.7.13.4", bind_fence},
    {"membar.cta|gl|sys", "9.7.13.4", bind_fence},
    {"fence.acquire.sync_restrict::shared::cluster.cluster", "9.7.13.4", bind_no_effect},
    {"fence.release.sync_restrict::shared::cta.cluster", "9.7.13.4", bind_no_effect},
    // Makes mbarrier.init visible; use of an mbarrier is checked against its init by warps alone.
    {"fence.mbarrier_init.release.cluster", "9.7.13.4", bind_no_effect},
    {"fence.proxy.async", "9.7.13.4", [](Bind& b) { b.run(&fence_proxy_async); }},
    {"fence.proxy.async.shared::cta|shared::cluster", "9.7.13.4", [](Bind& b) { b.run(&fence_proxy_async); }},
    {"fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster", "9.7.13.4",
     [](Bind& b) { b.run(&fence_proxy_async); }},
    {"fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster", "9.7.13.4", bind_no_effect},
    {"fence.proxy.async.global", "9.7.13.4", bind_no_effect},
    {"fence|membar.proxy.alias", "9.7.13.4", bind_no_effect},
    {"fence.proxy.tensormap::generic.release." SCOPE, "9.7.13.4", bind_no_effect},
    {"fence.proxy.tensormap::generic.acquire." SCOPE, "9.7.13.4", bind_tensormap_acquire},
    {"barrier.cluster.arrive.relaxed.aligned?", "9.7.13.3", bind_cluster_arrive<false>},
    {"barrier.cluster.arrive.release?.aligned?", "9.7.13.3", bind_cluster_arrive<true>},
    {"barrier.cluster.wait.acquire?.aligned?", "9.7.13.3",
     [](Bind& b) {
       if (b.has("aligned")) b.collective();
       b.run(&cluster_wait);
     }},
    {"griddepcontrol.launch_dependents", "9.7.13.13", bind_no_effect},
    {"griddepcontrol.wait", "9.7.13.13", [](Bind& b) { b.run(&wait_for_grids); }},
    {"setmaxnreg.inc|dec.sync.aligned.u32", "9.7.19.5",
     [](Bind& b) {
       const int64_t n = b.operands() == 1 ? b.constant(b.operand(0)) : 0;
       if (n < 24 || n > 256 || n % 8) b.refuse("the number of registers must be a multiple of 8 from 24 to 256");
       b.collective();
       b.run(&set_max_registers);
     }},
};
const Register registered(rows);

}  // namespace
}  // namespace forwardpass::interpreter
