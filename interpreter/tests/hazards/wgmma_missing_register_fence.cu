// Ordinary instructions and wgmma are not ordered in the registers that both access, but by wgmma.fence.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_missing_register_fence(const uint16_t* a, const uint16_t* b,
                                                        float* y) {  // y[64, 8] = 2 (a · b[0]ᵀ) + a · b[1]ᵀ
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[2][8 * 16];
  load_operand(sa, a, 64);
  for (int tile = 0; tile < 2; ++tile) load_operand(sb[tile], b + tile * 128, 8);
  fence_proxy_async();
  __syncthreads();
  float d[4] = {};
  wgmma_fence();
  wgmma_m64n8k16(d, descriptor(sa), descriptor(sb[0]));
  wgmma_commit();
  wgmma_wait<0>();
  for (int i = 0; i < 4; ++i) d[i] *= 2;
  if (!BROKEN) wgmma_fence();
  wgmma_m64n8k16(d, descriptor(sa), descriptor(sb[1]));  // HAZARD
  wgmma_commit();
  wgmma_wait<0>();
  store_m64n8(y, d);
}
