// wgmma reads by descriptor what cp.async has copied, through another proxy, with no fence behind the wait.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void wgmma_unfenced_copy(const uint16_t* a, const uint16_t* b, float* y) {  // y[64, 8] = a · bᵀ
  __shared__ alignas(128) uint16_t sa[64 * 16], sb[8 * 16];
  const int row = threadIdx.x / 2, k = threadIdx.x % 2 * 8;
  cp_async(&sa[core_matrix_index(row, k)], &a[row * 16 + k]);
  if (row < 8) cp_async(&sb[core_matrix_index(row, k)], &b[row * 16 + k]);
  cp_async_commit();
  cp_async_wait<0>();
  if (!BROKEN) fence_proxy_async();
  __syncthreads();
  float d[4] = {};
  wgmma_fence();
  wgmma_m64n8k16(d, descriptor(sa), descriptor(sb));  // HAZARD
  wgmma_commit();
  wgmma_wait<0>();
  store_m64n8(y, d);
}
