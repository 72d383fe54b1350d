// A value that one warp stores to shared memory and another loads needs a barrier in between.
// Reports: race or uninitialised
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void missing_barrier(const float* x, float* y) {  // y = x reversed
  __shared__ float s[128];
  s[threadIdx.x] = x[threadIdx.x];  // HAZARD: where the warp that loads came first
  if (!BROKEN) __syncthreads();
  y[threadIdx.x] = s[127 - threadIdx.x];  // HAZARD
}
