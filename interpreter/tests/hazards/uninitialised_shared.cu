// The tail of a tile that nobody filled.
// Reports: uninitialised
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void uninitialised_shared(const float* x, float* y, int n) {  // y[64] = x[n], then 0, reversed
  __shared__ float s[64];
  if (threadIdx.x < n || !BROKEN) s[threadIdx.x] = threadIdx.x < n ? x[threadIdx.x] : 0;
  __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HAZARD
}
