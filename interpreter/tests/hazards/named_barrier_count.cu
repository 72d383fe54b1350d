// Two warps arrive and one waits: a count of four warps is never reached.
// Reports: deadlock
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void named_barrier_count(const float* x, float* y) {  // y[32] = x[0, 32] + x[1, 32]
  __shared__ float s[64];
  constexpr int threads = BROKEN ? 128 : 96;
  if (threadIdx.x < 64) {
    s[threadIdx.x] = x[threadIdx.x];
    bar_arrive(1, threads);
  } else if (threadIdx.x < 96) {
    bar_sync(1, threads);  // HAZARD
    y[threadIdx.x - 64] = s[threadIdx.x - 64] + s[threadIdx.x - 32];
  }
}
