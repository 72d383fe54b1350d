// __syncthreads (bar.sync, .aligned) in a branch that a part of a warp takes.
// Reports: barrier or deadlock
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void divergent_barrier(const float* x, float* y) {  // y[64] = the halves of x exchanged
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  if (!BROKEN || threadIdx.x < 48) __syncthreads();  // HAZARD
  y[threadIdx.x] = s[threadIdx.x ^ 32];
}
