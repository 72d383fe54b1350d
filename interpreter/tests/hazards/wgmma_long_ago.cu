// A warpgroup waits for its product and tells nobody. Another one overwrites an operand of it, after many products of
// its own.
// Reports: race or in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_long_ago(const uint16_t* a, const uint16_t* b, float* y,
                                          int later) {  // y[64, 8] = a · bᵀ
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[8 * 16], others[8 * 16];
  load_operand(sa, a, 64);
  load_operand(sb, b, 8);
  load_operand(others, b, 8);
  fence_proxy_async();
  __syncthreads();
  const bool first = threadIdx.x < 128;
  float d[4] = {};
  for (int n = 0; n < (first ? 1 : later); ++n) {
    wgmma_fence();
    wgmma_m64n8k16(d, descriptor(sa), descriptor(first ? sb : others));  // HAZARD: where the other one came first
    wgmma_commit();
    wgmma_wait<0>();
  }
  if (!BROKEN) __syncthreads();
  if (first) {
    store_m64n8(y, d);
  } else {
    sb[threadIdx.x - 128] = 0;  // HAZARD
  }
}
