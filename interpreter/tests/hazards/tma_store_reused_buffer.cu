// A buffer is refilled while TMA may still read it: the wait is for all groups but the one just committed.
// Reports: race or in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_store_reused_buffer(const float* x,
                                                   const __grid_constant__ TensorMap y) {  // y = x [16, 32]
  __shared__ alignas(128) float s[256];
  for (int tile = 0; tile < 2; ++tile) {
    s[threadIdx.x] = x[tile * 256 + threadIdx.x];  // HAZARD
    fence_proxy_async();
    __syncthreads();
    if (threadIdx.x == 0) {
      tma_store(y, 0, tile * 8, s);  // HAZARD: where it was read after that
      bulk_commit();
      bulk_wait_read<BROKEN>();
    }
    __syncthreads();
  }
  if (threadIdx.x == 0) bulk_wait<0>();
}
