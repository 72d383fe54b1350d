// cp.async.wait_group waits for committed groups only: what was not committed is in flight.
// Reports: in_flight or race
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void cp_async_uncommitted(const float4* x, float4* y) {  // y = x
  __shared__ float4 s[32];
  cp_async(&s[threadIdx.x], &x[threadIdx.x]);
  if (!BROKEN) cp_async_commit();
  cp_async_wait<0>();
  y[threadIdx.x] = s[threadIdx.x];  // HAZARD
}
