// cp.async refills a buffer that other warps may still read.
// Reports: race or in_flight
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void cp_async_reused_buffer(const float4* x,
                                                  float* y) {  // y[64] = sum of x[2, 64, 4] over 0 and 2
  __shared__ float4 s[64];
  float sum = 0;
  for (int row = 0; row < 2; ++row) {
    cp_async(&s[threadIdx.x], &x[row * 64 + threadIdx.x]);  // HAZARD
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    float4 v = s[63 - threadIdx.x];  // HAZARD: where the warp that copies came first
    sum += v.x + v.y + v.z + v.w;
    if (!BROKEN) __syncthreads();
  }
  y[63 - threadIdx.x] = sum;
}
