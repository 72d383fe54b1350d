// A double buffer that waits for all groups but one, when the one it reads is the latest.
// Reports: in_flight or race
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void cp_async_weak_wait(const float4* x, float4* y) {  // y[32] = x[0, 32] + x[1, 32]
  __shared__ float4 s[2][32];
  for (int row = 0; row < 2; ++row) {
    cp_async(&s[row][threadIdx.x], &x[row * 32 + threadIdx.x]);
    cp_async_commit();
  }
  cp_async_wait<BROKEN>();
  __syncthreads();
  float4 a = s[0][threadIdx.x ^ 1];
  float4 b = s[1][threadIdx.x ^ 1];  // HAZARD
  y[threadIdx.x ^ 1] = {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}
