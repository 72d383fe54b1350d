// The parity of the phase before: the wait for the second tile is over before it began, or never if the copy was fast.
// Reports: in_flight or race or deadlock
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void mbarrier_wrong_phase(const __grid_constant__ TensorMap x,
                                                float* y) {  // y [8, 32] = x[:8] + x[8:]
  __shared__ alignas(128) float s[256];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
  }
  float sum = 0;
  for (int tile = 0; tile < 2; ++tile) {
    __syncthreads();
    if (threadIdx.x == 0) {
      mbarrier_arrive_expect_tx(&full, sizeof(s));
      tma_load(s, x, 0, tile * 8, &full);
    }
    __syncthreads();
    mbarrier_wait(&full, BROKEN ? 0 : tile);  // HAZARD
    sum += s[threadIdx.x];                    // HAZARD
  }
  y[threadIdx.x] = sum;
}
