// Two groups of wgmma, and the accumulators of the latest are read when all groups but one are done.
// Reports: in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_weak_wait(const uint16_t* a, const uint16_t* b,
                                           float* y) {  // y[2, 64, 8] += a · bᵀ
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[2][8 * 16];
  load_operand(sa, a, 64);
  load_operand(sb[0], b, 8);
  load_operand(sb[1], b + 8 * 16, 8);
  fence_proxy_async();
  __syncthreads();
  float d[2][4];
  load_m64n8(d[0], y);
  load_m64n8(d[1], y + 64 * 8);
  wgmma_fence();
  wgmma_m64n8k16(d[0], descriptor(sa), descriptor(sb[0]));
  wgmma_commit();
  wgmma_fence();
  wgmma_m64n8k16(d[1], descriptor(sa), descriptor(sb[1]));
  wgmma_commit();
  wgmma_wait<BROKEN>();
  store_m64n8(y, d[0]);
  store_m64n8(y + 64 * 8, d[1]);  // HAZARD
}
