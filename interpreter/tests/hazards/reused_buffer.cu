// The second barrier of a loop: what other warps may still read is overwritten in the next iteration.
// Reports: race
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void reused_buffer(const float* x, float* y) {  // y[128] = sum of the 4 reversed rows of x
  __shared__ float s[128];
  float sum = 0;
  for (int row = 0; row < 4; ++row) {
    s[threadIdx.x] = x[row * 128 + threadIdx.x];  // HAZARD
    __syncthreads();
    sum += s[127 - threadIdx.x];  // HAZARD: where the warp that stores came first
    if (!BROKEN) __syncthreads();
  }
  y[threadIdx.x] = sum;
}
