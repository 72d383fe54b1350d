#pragma once
// Bugs of public projects that others confirmed, each as a small kernel of our own with the same mistake.
//
// KERNEL name(x, y) has a template parameter `broken`, and TWINS(name) makes both kernels of it. "// HAZARD" ends the
// lines where the finding may be. ../recall_bugs.py has the link, the launch and the result of each.
#define BROKEN 0  // what hazard.cuh asks its own kernels for: here both twins come of one compilation
#include "../hazards/hazard.cuh"

#define KERNEL           \
  template <bool broken> \
  __global__ void
#define TWINS_OF(name, ...)                         \
  template __global__ void name<true>(__VA_ARGS__); \
  template __global__ void name<false>(__VA_ARGS__)
#define TWINS(name) TWINS_OF(name, const float*, float*)

INLINE float warp_max(float v) {
  for (int step = 16; step > 0; step /= 2) v = fmaxf(v, __shfl_xor_sync(~0u, v, step));
  return v;
}
INLINE float warp_sum(float v) {
  for (int step = 16; step > 0; step /= 2) v += __shfl_xor_sync(~0u, v, step);
  return v;
}

// 9.7.9.25.4 cp.async.bulk: to shared memory, and from it
INLINE void bulk_load(void* shared, const void* global, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                   shared_address(shared)),
               "l"(global), "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}
INLINE void bulk_store(void* global, const void* shared, int bytes) {
  asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(global), "r"(shared_address(shared)),
               "r"(bytes)
               : "memory");
}
