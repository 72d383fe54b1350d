// The barrier of a cluster (ISA 9.7.13.3), and the fence that makes mbarriers known across it (9.7.13.4).
#include "../explore/execution.h"
#include "../mbarrier.h"
#include "../table.h"

namespace gpuless {

// A thread arrives and then waits; arrivals of a warp's lanes are kept as masks, by the warp's number in the cluster.
struct ClusterBarrier {
  struct Lanes {
    Mask arrived = 0;   // in this phase
    Mask released = 0;  // by the end of the phase before; they have not waited yet
  };
  std::vector<Lanes> warps;
  uint64_t phases = 0;  // complete
  Knowledge gathering, completed;
};

namespace {

ClusterBarrier& state_of(Cluster& cluster) {
  if (!cluster.barrier) {
    cluster.barrier = std::make_shared<ClusterBarrier>();
    cluster.barrier->warps.resize(cluster.warps.size());
  }
  return *cluster.barrier;
}

ClusterBarrier::Lanes& lanes_of(const Warp& w) { return state_of(*w.cta->cluster).warps[w.agent - kFirstWarp]; }

// Threads that have exited are not waited for.
void settle(Cluster& cluster, ClusterBarrier& b) {
  for (size_t k = 0; k < b.warps.size(); ++k) {
    if (cluster.warps[k]->live & ~b.warps[k].arrived) return;
  }
  for (auto& lanes : b.warps) {
    lanes.released |= lanes.arrived;
    lanes.arrived = 0;
  }
  ++b.phases;
  b.completed = b.gathering;
  b.gathering = Knowledge();
  cluster.happened();
}

template <bool release>
Step arrive(Warp& w, const Instruction&, Mask mask) {
  ClusterBarrier& b = state_of(*w.cta->cluster);
  ClusterBarrier::Lanes& lanes = lanes_of(w);
  if (const Mask twice = mask & (lanes.arrived | lanes.released)) {
    w.fail(Kind::barrier, "barrier.cluster.arrive a second time, with no barrier.cluster.wait between",
           __builtin_ctz(twice));
  }
  lanes.arrived |= mask;
  ++w.effects;
  if (Execution* e = w.cta->launch->execution) e->phase(cluster_barrier_object(*w.cta), b.phases, Touch::arrive);
  if (release) {
    b.gathering.join(w.knowledge);
    w.release();
  } else if (w.fenced) {
    b.gathering.join(*w.fenced);
  }
  settle(*w.cta->cluster, b);
  return Step::next;
}

Step wait(Warp& w, const Instruction&, Mask mask) {
  ClusterBarrier& b = state_of(*w.cta->cluster);
  ClusterBarrier::Lanes& lanes = lanes_of(w);
  if (const Mask early = mask & ~(lanes.arrived | lanes.released)) {
    w.fail(Kind::barrier, "barrier.cluster.wait with no barrier.cluster.arrive before it", __builtin_ctz(early));
  }
  if (mask & lanes.arrived) settle(*w.cta->cluster, b);  // others may have exited
  if (mask & lanes.arrived) return Step::blocked;
  lanes.released &= ~mask;
  if (Execution* e = w.cta->launch->execution) e->phase(cluster_barrier_object(*w.cta), b.phases, Touch::pass);
  w.cluster_phases = b.phases;
  w.acquire(mask, b.completed);
  return Step::next;
}

// The mbarriers that the warp has initialised so far are known to whoever waits for the next phase that it arrives at,
// however relaxed the arrival.
Step fence_mbarrier_init(Warp& w, const Instruction&, Mask) {
  const uint64_t next = state_of(*w.cta->cluster).phases + (lanes_of(w).arrived ? 2 : 1);
  for (auto& [address, b] : w.cta->mbarriers)
    if (b->initialiser == w.agent && !b->published) b->published = next;
  return Step::next;
}

template <Handler handler>
void bind_barrier(Bind& b) {
  if (b.operands()) b.refuse("expected no operands");
  if (b.has("aligned")) b.collective();
  b.run(handler);
}

const Row rows[] = {
    {"barrier.cluster.arrive.relaxed.aligned?", "9.7.13.3", bind_barrier<&arrive<false>>},
    {"barrier.cluster.arrive.release?.aligned?", "9.7.13.3", bind_barrier<&arrive<true>>},
    {"barrier.cluster.wait.acquire?.aligned?", "9.7.13.3", bind_barrier<&wait>},
    {"fence.mbarrier_init.release.cluster", "9.7.13.4", bind_barrier<&fence_mbarrier_init>},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
