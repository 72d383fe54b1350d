// wgmma.wait_group waits for committed groups only: what was not committed is in flight.
// Reports: in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_uncommitted(const uint16_t* a, const uint16_t* b, float* y) {  // y[64, 8] = a · bᵀ
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[8 * 16];
  load_operand(sa, a, 64);
  load_operand(sb, b, 8);
  fence_proxy_async();
  __syncthreads();
  float d[4] = {};
  wgmma_fence();
  wgmma_m64n8k16(d, descriptor(sa), descriptor(sb));
  if (!BROKEN) wgmma_commit();
  wgmma_wait<0>();
  store_m64n8(y, d);  // HAZARD
}
