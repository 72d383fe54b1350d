// An mbarrier is used by other warps without a barrier after its initialisation.
// Reports: mbarrier or race or uninitialised
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void mbarrier_before_init(const float* x, float* y) {  // y[128] = x reversed
  __shared__ float s[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) mbarrier_init(&full, 128);
  if (!BROKEN) __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];
  mbarrier_arrive(&full);  // HAZARD
  mbarrier_wait(&full, 0);
  y[threadIdx.x] = s[127 - threadIdx.x];
}
