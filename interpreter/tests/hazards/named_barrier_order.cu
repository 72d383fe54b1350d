// Two warps that wait for each other at different barriers.
// Reports: deadlock
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void named_barrier_order(const float* x, float* y) {  // y = x reversed
  __shared__ float s[64];
  s[threadIdx.x] = x[threadIdx.x];
  int name = BROKEN && threadIdx.x >= 32 ? 2 : 1;
  bar_sync(name, 64);  // HAZARD
  y[threadIdx.x] = s[63 - threadIdx.x];
  bar_sync(3 - name, 64);
}
