// cp.async.wait_group orders a thread's own copies, not those of other threads: they need a barrier as well.
// Reports: race or in_flight or uninitialised
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void cp_async_missing_barrier(const float4* x, float4* y) {  // y = x reversed
  __shared__ float4 s[64];
  cp_async(&s[threadIdx.x], &x[threadIdx.x]);  // HAZARD: where the warp that loads came first
  cp_async_commit();
  cp_async_wait<0>();
  if (!BROKEN) __syncthreads();
  y[threadIdx.x] = s[63 - threadIdx.x];  // HAZARD
}
