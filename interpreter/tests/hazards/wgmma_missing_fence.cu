// wgmma reads shared memory through the async proxy, which sees generic stores after fence.proxy.async only.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_missing_fence(const uint16_t* a, const uint16_t* b, float* y) {  // y[64, 8] = a · bᵀ
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[8 * 16];
  load_operand(sa, a, 64);
  load_operand(sb, b, 8);
  if (!BROKEN) fence_proxy_async();
  __syncthreads();
  float d[4] = {};
  wgmma_fence();
  wgmma_m64n8k16(d, descriptor(sa), descriptor(sb));  // HAZARD
  wgmma_commit();
  wgmma_wait<0>();
  store_m64n8(y, d);
}
