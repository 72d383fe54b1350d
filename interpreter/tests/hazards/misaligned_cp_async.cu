// Rows of 28 bytes in shared memory, where cp.async of 16 needs a multiple of 16.
// Reports: misaligned
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void misaligned_cp_async(const float* x, float* y) {  // y = x, [32, 4]
  constexpr int stride = BROKEN ? 7 : 8;
  __shared__ alignas(16) float s[32 * stride];
  cp_async(&s[threadIdx.x * stride], &x[threadIdx.x * 4]);  // HAZARD
  cp_async_commit();
  cp_async_wait<0>();
  for (int i = 0; i < 4; ++i) y[threadIdx.x * 4 + i] = s[threadIdx.x * stride + i];
}
