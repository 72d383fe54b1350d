#pragma once
// What the hazards share: one PTX instruction a function, with its section in the PTX ISA.
//
// Every .cu beside this file is a kernel of the same name that is right with -DBROKEN=0 and has one fault with
// -DBROKEN=1. The header comment says what must be reported, and "// HAZARD" ends the lines where: several where the
// schedule decides which of two accesses comes second. A line is one of the .cu file's: a finding inside one of the
// functions below belongs to the line that calls it. The header comment is read by test_hazards.py: "Reports: kind
// [or kind]" and "Needs: architecture".
#include <cstdint>

#ifndef BROKEN
#error "compile with -DBROKEN=0 or -DBROKEN=1"
#endif

#define INLINE __device__ __forceinline__

INLINE uint32_t shared_address(const void* p) { return static_cast<uint32_t>(__cvta_generic_to_shared(p)); }

// 9.7.13.1 bar (barrier.cta): what .aligned means holds for both
INLINE void bar_sync(int name, int threads) { asm volatile("bar.sync %0, %1;" ::"r"(name), "r"(threads) : "memory"); }
INLINE void bar_arrive(int name, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(name), "r"(threads) : "memory");
}

// 9.7.9.25.3 cp.async: 16 bytes
INLINE void cp_async(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)), "l"(global) : "memory");
}
INLINE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int N>
INLINE void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(N) : "memory");
}

// 9.7.14.5.15 ldmatrix: four matrices of 8 x 8 halves, a row's address of each lane
INLINE void ldmatrix(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 9.7.13.15 mbarrier
INLINE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
INLINE void mbarrier_arrive(uint64_t* barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
INLINE void mbarrier_arrive_expect_tx(uint64_t* barrier, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
               : "memory");
}
INLINE void mbarrier_wait(uint64_t* barrier, int parity) {
  asm volatile(
      "{\n"
      ".reg .pred complete;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 complete, [%0], %1;\n"
      "@!complete bra again;\n"
      "}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}

// 9.7.13.4 membar, fence: mbarrier objects as the async proxy sees them; generic accesses before async ones
INLINE void fence_mbarrier_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
INLINE void fence_proxy_async() { asm volatile("fence.proxy.async;" ::: "memory"); }

// 9.7.9.25.5 cp.async.bulk.tensor. The type of a tensor map without <cuda.h>, which not every toolkit brings.
struct alignas(64) TensorMap {
  char opaque[128];
};
INLINE void tma_load(void* shared, const TensorMap& map, int x, int y, uint64_t* barrier) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%2, %3}], [%4];" ::
          "r"(shared_address(shared)),
      "l"(&map), "r"(x), "r"(y), "r"(shared_address(barrier))
      : "memory");
}
INLINE void tma_store(const TensorMap& map, int x, int y, const void* shared) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%1, %2}], [%3];" ::"l"(&map), "r"(x),
               "r"(y), "r"(shared_address(shared))
               : "memory");
}
INLINE void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int N>
INLINE void bulk_wait() {
  asm volatile("cp.async.bulk.wait_group %0;" ::"n"(N) : "memory");
}
template <int N>
INLINE void bulk_wait_read() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(N) : "memory");
}

// 9.7.13.3 barrier.cluster, 9.7.9.23 mapa, 9.7.9.25.4 cp.async.bulk to several CTAs
INLINE void cluster_sync() {
  asm volatile("barrier.cluster.arrive.aligned;\nbarrier.cluster.wait.aligned;" ::: "memory");
}
INLINE uint32_t cluster_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
INLINE float load_of_cta(const float* shared, uint32_t rank) {
  float value;
  asm volatile(
      "{\n"
      ".reg .b32 there;\n"
      "mapa.shared::cluster.u32 there, %1, %2;\n"
      "ld.shared::cluster.f32 %0, [there];\n"
      "}"
      : "=f"(value)
      : "r"(shared_address(shared)), "r"(rank)
      : "memory");
  return value;
}
INLINE void bulk_multicast(void* shared, const void* global, int bytes, uint64_t* barrier, uint16_t ctas) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%0], [%1], %2, [%3], "
      "%4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "h"(ctas)
      : "memory");
}

// 9.7.15 wgmma
INLINE void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
INLINE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N>
INLINE void wgmma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(N) : "memory");
}
// 9.7.15.5.1 core matrices of 8 rows x 16 bytes, K-major, no swizzle: two along K, 128 bytes apart; the next eight rows
// 256 bytes on
INLINE int core_matrix_index(int row, int k) { return row / 8 * 128 + k / 8 * 64 + row % 8 * 8 + k % 8; }
INLINE uint64_t descriptor(const void* shared) {
  return (shared_address(shared) & 0x3ffff) >> 4 | uint64_t{128 >> 4} << 16 | uint64_t{256 >> 4} << 32;
}
// d += A·Bᵀ, A [64, 16] and B [8, 16] of f16. A lane's four are rows lane/4 and 8 more of its warp's 16, two columns.
INLINE void wgmma_m64n8k16(float (&d)[4], uint64_t a, uint64_t b) {
  asm volatile("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16 {%0, %1, %2, %3}, %4, %5, 1, 1, 1, 0, 0;"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "l"(a), "l"(b)
               : "memory");
}
// The accumulators above from and to y [64, 8].
INLINE int m64n8_index(int i) {
  int lane = threadIdx.x % 32, row = threadIdx.x / 32 * 16 + lane / 4, column = lane % 4 * 2;
  return (row + i / 2 * 8) * 8 + column + i % 2;
}
INLINE void load_m64n8(float (&d)[4], const float* y) {
  for (int i = 0; i < 4; ++i) d[i] = y[m64n8_index(i)];
}
INLINE void store_m64n8(float* y, const float (&d)[4]) {
  for (int i = 0; i < 4; ++i) y[m64n8_index(i)] = d[i];
}
// Row-major operands [rows, 16] of global memory to core matrices, by the whole block.
INLINE void load_operand(uint16_t* shared, const uint16_t* global, int rows) {
  for (int i = threadIdx.x; i < rows * 16; i += blockDim.x) shared[core_matrix_index(i / 16, i % 16)] = global[i];
}

// 9.7.16 tcgen05: 32 columns of tensor memory, by a warp; products and their completion, by a thread
INLINE void tensor_alloc(uint32_t* address) {
  asm volatile("tcgen05.alloc.cta_group::1.sync.aligned.shared::cta.b32 [%0], 32;" ::"r"(shared_address(address))
               : "memory");
}
INLINE void tensor_free(uint32_t address) {
  asm volatile("tcgen05.dealloc.cta_group::1.sync.aligned.b32 %0, 32;" ::"r"(address));
}
// d = A·Bᵀ, or d += it; A [128, 16] and B [16, 16] of f16 in core matrices as above, d [128, 16]: lanes by columns
INLINE void tensor_product(uint32_t d, const void* a, const void* b, bool accumulate) {
  const uint64_t version = uint64_t{1} << 46;
  asm volatile(
      "{\n"
      ".reg .pred accumulate;\n"
      "setp.ne.u32 accumulate, %4, 0;\n"
      "tcgen05.mma.cta_group::1.kind::f16 [%0], %1, %2, %3, accumulate;\n"
      "}" ::"r"(d),
      "l"(descriptor(a) | version), "l"(descriptor(b) | version), "r"(1 << 4 | 16 / 8 << 17 | 128 / 16 << 24),
      "r"(static_cast<uint32_t>(accumulate))
      : "memory");
}
INLINE void tensor_commit(uint64_t* barrier) {
  asm volatile(
      "tcgen05.commit.cta_group::1.mbarrier::arrive::one.shared::cluster.b64 [%0];" ::"r"(shared_address(barrier))
      : "memory");
}
// A warp's 32 lanes by four columns, whose wait is apart.
INLINE uint32_t tensor_lanes(uint32_t address) { return address + (threadIdx.x / 32 << 21); }
INLINE void tensor_load(float (&d)[4], uint32_t address) {
  asm volatile("tcgen05.ld.sync.aligned.32x32b.x4.b32 {%0, %1, %2, %3}, [%4];"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(tensor_lanes(address))
               : "memory");
}
INLINE void tensor_load_wait() { asm volatile("tcgen05.wait::ld.sync.aligned;" ::: "memory"); }
INLINE void tensor_store(uint32_t address, float value) {
  asm volatile("tcgen05.st.sync.aligned.32x32b.x4.b32 [%0], {%1, %1, %1, %1};" ::"r"(tensor_lanes(address)), "f"(value)
               : "memory");
}
INLINE void tensor_store_wait() { asm volatile("tcgen05.wait::st.sync.aligned;" ::: "memory"); }

// 9.7.13.13 griddepcontrol
INLINE void griddepcontrol_wait() { asm volatile("griddepcontrol.wait;" ::: "memory"); }
INLINE void griddepcontrol_launch_dependents() { asm volatile("griddepcontrol.launch_dependents;" ::: "memory"); }
