#include "special.h"

#include "device.h"
#include "machine.h"

namespace gpuless {
namespace {

uint64_t thread(const Warp& w, int lane) { return static_cast<uint64_t>(w.id) * kLanes + lane; }

template <int D>
uint64_t tid(const Warp& w, int lane) {
  const unsigned* n = w.cta->launch->block;
  const uint64_t t = thread(w, lane);
  return D == 0 ? t % n[0] : D == 1 ? t / n[0] % n[1] : t / n[0] / n[1];
}
template <int D>
uint64_t ntid(const Warp& w, int) {
  return w.cta->launch->block[D];
}
template <int D>
uint64_t ctaid(const Warp& w, int) {
  return w.cta->index[D];
}
template <int D>
uint64_t nctaid(const Warp& w, int) {
  return w.cta->launch->grid[D];
}
template <int D>
uint64_t clusterid(const Warp& w, int) {
  return w.cta->index[D] / w.cta->launch->cluster[D];
}
template <int D>
uint64_t nclusterid(const Warp& w, int) {
  return w.cta->launch->grid[D] / w.cta->launch->cluster[D];
}
template <int D>
uint64_t cluster_ctaid(const Warp& w, int) {
  return w.cta->index[D] % w.cta->launch->cluster[D];
}
template <int D>
uint64_t cluster_nctaid(const Warp& w, int) {
  return w.cta->launch->cluster[D];
}
uint64_t cluster_ctarank(const Warp& w, int l) {
  const unsigned* n = w.cta->launch->cluster;
  return cluster_ctaid<0>(w, l) + n[0] * (cluster_ctaid<1>(w, l) + n[1] * cluster_ctaid<2>(w, l));
}
uint64_t cluster_nctarank(const Warp& w, int) {
  const unsigned* n = w.cta->launch->cluster;
  return static_cast<uint64_t>(n[0]) * n[1] * n[2];
}
uint64_t nwarpid(const Warp& w, int) { return w.cta->warps.size(); }
uint64_t sm_count() { return static_cast<uint64_t>(current_device()->multiprocessors); }
uint64_t cta_number(const Warp& w) {
  const unsigned *i = w.cta->index, *n = w.cta->launch->grid;
  return i[0] + static_cast<uint64_t>(n[0]) * (i[1] + static_cast<uint64_t>(n[1]) * i[2]);
}

const SpecialRegister registers[] = {
    {"%tid.x", tid<0>},
    {"%tid.y", tid<1>},
    {"%tid.z", tid<2>},
    {"%ntid.x", ntid<0>},
    {"%ntid.y", ntid<1>},
    {"%ntid.z", ntid<2>},
    {"%ctaid.x", ctaid<0>},
    {"%ctaid.y", ctaid<1>},
    {"%ctaid.z", ctaid<2>},
    {"%nctaid.x", nctaid<0>},
    {"%nctaid.y", nctaid<1>},
    {"%nctaid.z", nctaid<2>},
    {"%clusterid.x", clusterid<0>},
    {"%clusterid.y", clusterid<1>},
    {"%clusterid.z", clusterid<2>},
    {"%nclusterid.x", nclusterid<0>},
    {"%nclusterid.y", nclusterid<1>},
    {"%nclusterid.z", nclusterid<2>},
    {"%cluster_ctaid.x", cluster_ctaid<0>},
    {"%cluster_ctaid.y", cluster_ctaid<1>},
    {"%cluster_ctaid.z", cluster_ctaid<2>},
    {"%cluster_nctaid.x", cluster_nctaid<0>},
    {"%cluster_nctaid.y", cluster_nctaid<1>},
    {"%cluster_nctaid.z", cluster_nctaid<2>},
    {"%cluster_ctarank", cluster_ctarank},
    {"%cluster_nctarank", cluster_nctarank},
    {"%is_explicit_cluster", [](const Warp& w, int l) -> uint64_t { return cluster_nctarank(w, l) > 1; }},
    {"%laneid", [](const Warp&, int l) -> uint64_t { return l; }},
    {"%warpid", [](const Warp& w, int) -> uint64_t { return w.id; }},
    {"%nwarpid", nwarpid},
    {"%smid", [](const Warp& w, int) -> uint64_t { return cta_number(w) % sm_count(); }},
    {"%nsmid", [](const Warp&, int) -> uint64_t { return sm_count(); }},
    {"%gridid", [](const Warp& w, int) -> uint64_t { return w.cta->launch->number; }},
    {"%lanemask_eq", [](const Warp&, int l) -> uint64_t { return 1u << l; }},
    {"%lanemask_lt", [](const Warp&, int l) -> uint64_t { return (1u << l) - 1; }},
    {"%lanemask_le", [](const Warp&, int l) -> uint64_t { return (2u << l) - 1; }},
    {"%lanemask_gt", [](const Warp&, int l) -> uint64_t { return ~((2u << l) - 1); }},
    {"%lanemask_ge", [](const Warp&, int l) -> uint64_t { return ~((1u << l) - 1); }},
    {"%dynamic_smem_size", [](const Warp& w, int) -> uint64_t { return w.cta->launch->dynamic_shared; }},
    {"%total_smem_size", [](const Warp& w, int) -> uint64_t { return w.cta->shared.size(); }},
};

}  // namespace

const SpecialRegister* special_register(std::string_view name) {
  for (const auto& r : registers)
    if (r.name == name) return &r;
  return nullptr;
}

}  // namespace gpuless
