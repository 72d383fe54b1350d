// Needs: sm_90a
#include "twins.cuh"

// A barrier between a write and a read was dropped, as 48 threads are no whole warps.
KERNEL tilelang_2556(const float* x, float* y) {  // y[48] = x[48] reversed
  __shared__ float s[48];
  if (threadIdx.x < 48) s[threadIdx.x] = x[threadIdx.x];  // HAZARD
  if (!broken) __syncthreads();
  if (threadIdx.x < 48) y[threadIdx.x] = s[47 - threadIdx.x];  // HAZARD
}
TWINS(tilelang_2556);

// A barrier was put into a branch that half of the lanes take.
KERNEL tilelang_1026(const float* x, float* y) {  // y[32] = x[32], odd ones replaced by the even before
  __shared__ float s[32];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  const float even = s[threadIdx.x];
  if (!broken) __syncthreads();
  if (threadIdx.x % 2 == 0) {
    if (broken) __syncthreads();  // HAZARD
    s[threadIdx.x + 1] = even;
  }
  __syncthreads();  // HAZARD
  y[threadIdx.x] = s[threadIdx.x];
}
TWINS(tilelang_1026);

// Two warpgroups multiply by the same operand. One waits for its own product and fills the operand again: the other's
// product may still read it.
KERNEL tilelang_2613(const float* x, float* y) {  // y[2, 64, 8] += 16 twice: x is 1
  __shared__ alignas(128) uint16_t a[64 * 16], b[8 * 16];
  const uint16_t one = x[0] == 1 ? 0x3c00 : 0;
  for (int i = threadIdx.x; i < 64 * 16; i += 256) a[i] = one;
  float d[4] = {};
  for (int step = 0; step < 2; ++step) {
    if (threadIdx.x < 128) b[threadIdx.x] = one;  // HAZARD
    fence_proxy_async();
    __syncthreads();
    wgmma_fence();
    wgmma_m64n8k16(d, descriptor(a), descriptor(b));  // HAZARD
    wgmma_commit();
    wgmma_wait<0>();
    if (!broken) __syncthreads();
  }
  const int group = threadIdx.x / 128, lane = threadIdx.x % 32, warp = threadIdx.x % 128 / 32;
  for (int i = 0; i < 4; ++i) y[group * 512 + (warp * 16 + lane / 4 + i / 2 * 8) * 8 + lane % 4 * 2 + i % 2] = d[i];
}
TWINS(tilelang_2613);
