#pragma once
// One PTX instruction per function, with its section in the PTX ISA: mbarriers, TMA, clusters. sm_90a.
#include <cuda.h>

#include "device/ptx_sm80.cuh"

namespace forwardpass::ptx {

// 9.7.13.15 mbarrier, by its address in shared memory
__device__ inline void mbarrier_init(uint32_t barrier, int count) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(count) : "memory");
}
// Other CTAs of the cluster and the async proxy may use what has been initialised, once a cluster barrier has followed.
__device__ inline void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ inline void mbarrier_arrive_expect_tx(uint32_t barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
// of the threads with a `condition`; after a branch that says so a warp need not be together again
__device__ inline void mbarrier_arrive(uint32_t barrier, bool condition) {
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "setp.ne.b32 p, %1, 0;\n"
      "@p mbarrier.arrive.shared::cta.b64 _, [%0];\n"
      "}" ::"r"(barrier),
      "r"(static_cast<int>(condition))
      : "memory");
}
// At an mbarrier of any CTA of the cluster, as map_shared gives its address. With the scope of a cluster, ptxas makes
// fences of the whole GPU of it (MEMBAR.ALL.GPU, for a wait CCTL.IVALL); what is ordered here are reads of shared
// memory that have ended and the async proxy's writes, and CUTLASS too does without.
__device__ inline void mbarrier_arrive_cluster(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cluster.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ inline bool mbarrier_try_wait(uint32_t barrier, uint32_t parity) {
  uint32_t ready;
  asm volatile(
      "{\n"
      ".reg .pred p;\n"
      "mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
      "selp.u32 %0, 1, 0, p;\n"
      "}"
      : "=r"(ready)
      : "r"(barrier), "r"(parity)
      : "memory");
  return ready;
}
// 9.7.13.1 bar: a barrier of `threads`, whole warps, of the block; arrive: without waiting
__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}
__device__ inline void barrier_arrive(int barrier, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// 9.7.9.8 ld.shared
__device__ inline float load_shared(uint32_t address) {
  float value;
  asm volatile("ld.shared.f32 %0, [%1];" : "=f"(value) : "r"(address) : "memory");
  return value;
}
// of any CTA of the cluster, as map_shared gives the address
__device__ inline uint4 load_cluster(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "r"(address)
               : "memory");
  return v;
}
template <int Offset>
__device__ inline uint32_t load_shared_16(uint32_t address) {
  uint32_t value;
  asm volatile("ld.shared.u16 %0, [%1 + %2];" : "=r"(value) : "r"(address), "n"(Offset) : "memory");
  return value;
}

// 9.7.14.5.16 stmatrix, as stmatrix_x4, each matrix transposed
__device__ inline void stmatrix_x4_trans(uint32_t address, const uint32_t (&s)[4]) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(s[0]),
               "r"(s[1]), "r"(s[2]), "r"(s[3])
               : "memory");
}

// 9.7.9.25.5.2 cp.async.bulk.tensor: a box at (column, row) of a matrix to shared memory; zeros beyond the matrix
__device__ inline void tma_load(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier)
      : "memory");
}
// of a tensor of five dimensions, the innermost first
__device__ inline void tma_load(uint32_t to, const CUtensorMap& map, const int (&coordinates)[5], uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5, %6}], [%7];" ::"r"(to),
      "l"(&map), "r"(coordinates[0]), "r"(coordinates[1]), "r"(coordinates[2]), "r"(coordinates[3]),
      "r"(coordinates[4]), "r"(barrier)
      : "memory");
}
// 5.5.4 im2col: a column of pixels from (channel, width, height, image) on, each read at so many pixels from its place
__device__ inline void tma_load_pixels(uint32_t to, const CUtensorMap& map, const int (&coordinates)[4], int offset_w,
                                       int offset_h, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], {%7, %8};" ::"r"(to),
      "l"(&map), "r"(coordinates[0]), "r"(coordinates[1]), "r"(coordinates[2]), "r"(coordinates[3]), "r"(barrier),
      "h"(static_cast<uint16_t>(offset_w)), "h"(static_cast<uint16_t>(offset_h))
      : "memory");
}
// to the same place of every CTA that `ctas` has a bit for, and each one's mbarrier
__device__ inline void tma_load_multicast(uint32_t to, const CUtensorMap& map, int column, int row, uint32_t barrier,
                                          uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%2, %3}], [%4], %5;" ::"r"(to),
      "l"(&map), "r"(column), "r"(row), "r"(barrier), "h"(ctas)
      : "memory");
}
// 9.7.9.15 prefetch.tensormap
__device__ inline void prefetch_tensor_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// 9.7.13.3 barrier.cluster; 10 special registers of the cluster; 9.7.9.23 mapa
__device__ inline void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
__device__ inline uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ inline uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
__device__ inline uint32_t map_shared(uint32_t address, uint32_t rank) {
  uint32_t there;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(address), "r"(rank));
  return there;
}

// 9.7.19.5 setmaxnreg, by every warp of a warpgroup
template <int Registers>
__device__ inline void setmaxnreg_dec() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ inline void setmaxnreg_inc() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

}  // namespace forwardpass::ptx
