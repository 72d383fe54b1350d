// A tile that TMA loads is read at once: __syncthreads does not wait for it.
// Reports: in_flight or race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_missing_wait(const __grid_constant__ TensorMap x, float* y) {  // y = x [8, 32]
  __shared__ alignas(128) float s[256];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full, sizeof(s));
    tma_load(s, x, 0, 0, &full);
  }
  __syncthreads();
  if (!BROKEN) mbarrier_wait(&full, 0);
  y[threadIdx.x] = s[threadIdx.x];  // HAZARD
  if (BROKEN) mbarrier_wait(&full, 0);
}
