// Initialised for one arrival more than comes: the phase never completes.
// Reports: deadlock
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void mbarrier_arrivals(const float* x, float* y) {  // y[128] = x reversed
  __shared__ float s[128];
  __shared__ uint64_t full;
  if (threadIdx.x == 0) mbarrier_init(&full, BROKEN ? 129 : 128);
  __syncthreads();
  s[threadIdx.x] = x[threadIdx.x];
  mbarrier_arrive(&full);
  mbarrier_wait(&full, 0);  // HAZARD
  y[threadIdx.x] = s[127 - threadIdx.x];
}
