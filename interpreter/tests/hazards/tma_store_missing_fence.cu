// TMA reads shared memory through the async proxy, which sees generic stores after fence.proxy.async only.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_store_missing_fence(const float* x,
                                                   const __grid_constant__ TensorMap y) {  // y = x [8, 32]
  __shared__ alignas(128) float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  if (!BROKEN) fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y, 0, 0, s);  // HAZARD
    bulk_commit();
    bulk_wait<0>();
  }
}
