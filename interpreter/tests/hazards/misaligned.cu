// A row of 16-byte vectors that begins off a 16-byte boundary.
// Reports: misaligned
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void misaligned(const float* x, float4* y) {  // y[16] = x[4:], four at a time
  const float* row = x + (BROKEN ? 3 : 4);
  y[threadIdx.x] = reinterpret_cast<const float4*>(row)[threadIdx.x];  // HAZARD
}
