// Fences (ISA 9.7.13.4), programmatic dependent launches (9.7.13.13), setmaxnreg (9.7.19.5). Memory is sequentially
// consistent here, so fences matter to the race check alone.
#include "../table.h"
#include "async.h"

namespace gpuless {

namespace {

Step no_effect(Warp&, const Instruction&, Mask) { return Step::next; }

// A relaxed arrival at the cluster's barrier after it releases what came before it, a relaxed write to global memory
// what came before anybody's fence.
Step fence(Warp& w, const Instruction&, Mask) {
  w.fenced = std::make_unique<Knowledge>(w.knowledge);
  w.cta->cluster->fenced.join(w.knowledge.seen);
  w.release();
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

// A fence of scope .cta orders nothing between CTAs.
void bind_fence(Bind& b) {
  if (b.has("cta")) return bind_no_effect(b);
  bind_plain<fence>(b);
}

Step wait_for_grids(Warp& w, const Instruction&, Mask) {
  w.knowledge.seen.clocks[kGridAgent] = 1;
  return Step::next;
}

// "must be executed by all threads in a warpgroup": the n-th one of each of its warps asks for the same. That they are
// one instruction is not asked for: Triton's warp-specialised partitions have one each.
Step set_max_registers(Warp& w, const Instruction& i, Mask mask) {
  if (mask != w.live) w.fail(Kind::barrier, "setmaxnreg needs every thread of the warp, and part of it is here");
  w.register_changes.push_back(&i);
  const size_t n = w.register_changes.size();
  const int first = w.id / 4 * 4, last = std::min<int>(first + 4, static_cast<int>(w.cta->warps.size()));
  for (int k = first; k < last; ++k) {
    const auto& other = w.cta->warps[k].register_changes;
    if (other.size() < n || (other[n - 1]->immediate == i.immediate && other[n - 1]->option == i.option)) continue;
    w.fail(Kind::barrier, "setmaxnreg differs within a warpgroup: warp " + std::to_string(k) + " has executed another");
  }
  return Step::next;
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
    {"fence.proxy.async", "9.7.13.4", [](Bind& b) { b.run(&fence_proxy_async); }},
    {"fence.proxy.async.shared::cta|shared::cluster", "9.7.13.4", [](Bind& b) { b.run(&fence_proxy_async); }},
    {"fence.proxy.async::generic.release.sync_restrict::shared::cta.cluster", "9.7.13.4",
     [](Bind& b) { b.run(&fence_proxy_async); }},
    {"fence.proxy.async::generic.acquire.sync_restrict::shared::cluster.cluster", "9.7.13.4", bind_no_effect},
    {"fence.proxy.async.global", "9.7.13.4", bind_no_effect},
    {"fence|membar.proxy.alias", "9.7.13.4", bind_no_effect},
    {"fence.proxy.tensormap::generic.release." SCOPE, "9.7.13.4", bind_no_effect},
    {"fence.proxy.tensormap::generic.acquire." SCOPE, "9.7.13.4", bind_tensormap_acquire},
    {"griddepcontrol.launch_dependents", "9.7.13.13", bind_no_effect},
    {"griddepcontrol.wait", "9.7.13.13", [](Bind& b) { b.run(&wait_for_grids); }},
    {"setmaxnreg.inc|dec.sync.aligned.u32", "9.7.19.5",
     [](Bind& b) {
       const int64_t n = b.operands() == 1 ? b.constant(b.operand(0)) : 0;
       if (n < 24 || n > 256 || n % 8) b.refuse("the number of registers must be a multiple of 8 from 24 to 256");
       b.instruction.immediate = static_cast<uint64_t>(n);
       b.instruction.option = b.has("inc");
       b.collective();
       b.run(&set_max_registers);
     }},
};
const Register registered(rows);

}  // namespace
}  // namespace gpuless
