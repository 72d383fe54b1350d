// An index reversed about the size, where the last index was meant.
// Reports: out_of_bounds
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void out_of_bounds_shared(const float* x, float* y) {  // y = x reversed
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = s[(BROKEN ? 64 : 63) - threadIdx.x];  // HAZARD
}
