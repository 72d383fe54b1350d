// TMA refills a buffer that other warps may still read: nobody waits for them to say that it is empty.
// Reports: race or in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_reused_buffer(const __grid_constant__ TensorMap x,
                                             float* y) {  // y [8, 32] = x[:8] + x[8:]
  __shared__ alignas(128) float s[256];
  __shared__ uint64_t full[2], empty;
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : full) mbarrier_init(&barrier, 1);
    mbarrier_init(&empty, 256);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x >= 256) {  // the producer's warp
    if (threadIdx.x == 256) {
      for (int tile = 0; tile < 2; ++tile) {
        if (!BROKEN && tile > 0) mbarrier_wait(&empty, 0);
        mbarrier_arrive_expect_tx(&full[tile], sizeof(s));
        tma_load(s, x, 0, tile * 8, &full[tile]);  // HAZARD
      }
    }
  } else {
    float sum = 0;
    for (int tile = 0; tile < 2; ++tile) {
      mbarrier_wait(&full[tile], 0);
      sum += s[threadIdx.x];  // HAZARD: where TMA came first
      mbarrier_arrive(&empty);
    }
    y[threadIdx.x] = sum;
  }
}
