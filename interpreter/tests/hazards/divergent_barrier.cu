// __syncthreads (bar.sync, .aligned) in a branch that a part of a warp takes.
// Reports: barrier or deadlock
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void divergent_barrier(const float* x, float* y) {  // y[64] = the halves of x exchanged, 48 on: 0
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (!BROKEN || threadIdx.x < 48) __syncthreads();  // HAZARD
  float other = threadIdx.x < 48 ? s[threadIdx.x ^ 32] : 0;
  __syncthreads();  // HAZARD: where the rest of the warp waits
  y[threadIdx.x] = other;
}
