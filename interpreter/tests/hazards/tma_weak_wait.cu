// Two stages with a barrier each, and the wait for the second is on the first one's.
// Reports: in_flight or race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_weak_wait(const __grid_constant__ TensorMap x, float* y) {  // y[8, 32] = x[:8] + x[8:]
  __shared__ alignas(128) float s[2][256];
  __shared__ uint64_t full[2];
  if (threadIdx.x == 0) {
    for (uint64_t& barrier : full) mbarrier_init(&barrier, 1);
    fence_mbarrier_init();
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < 2; ++stage) {
      mbarrier_arrive_expect_tx(&full[stage], sizeof(s[stage]));
      tma_load(s[stage], x, 0, stage * 8, &full[stage]);
    }
  }
  __syncthreads();
  mbarrier_wait(&full[0], 0);
  float sum = s[0][threadIdx.x];
  mbarrier_wait(&full[BROKEN ? 0 : 1], 0);
  y[threadIdx.x] = sum + s[1][threadIdx.x];  // HAZARD
}
