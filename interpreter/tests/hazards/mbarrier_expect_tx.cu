// More bytes are expected than arrive: the phase never completes.
// Reports: deadlock
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void mbarrier_expect_tx(const __grid_constant__ TensorMap x, float* y) {  // y = x [8, 32]
  __shared__ alignas(128) float s[256];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) {
    mbarrier_init(&full, 1);
    fence_mbarrier_init();
    mbarrier_arrive_expect_tx(&full, BROKEN ? 2 * sizeof(s) : sizeof(s));
    tma_load(s, x, 0, 0, &full);
  }
  __syncthreads();
  mbarrier_wait(&full, 0);  // HAZARD
  y[threadIdx.x] = s[threadIdx.x];
}
