// A value that one lane stores to shared memory and another of its warp loads needs a __syncwarp in between: that the
// lanes have met at a shuffle says nothing about memory.
// Reports: race
// Needs: sm_80
#include "hazard.cuh"

// y: each row of 32 reversed, less its first
extern "C" __global__ void missing_syncwarp(const float* x, float* y) {
  __shared__ float s[128];
  int warp = threadIdx.x / 32 * 32, lane = threadIdx.x % 32;
  s[warp + lane] = x[warp + lane];
  float first = __shfl_sync(0xffffffff, x[warp + lane], 0);
  if (!BROKEN) __syncwarp();
  y[warp + lane] = s[warp + 31 - lane] - first;  // HAZARD
}
