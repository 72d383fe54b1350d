// cp.async.wait_group is for the copies of the thread that executes it: what another lane of the warp has copied is
// there for it only after a __syncwarp; ldmatrix reads rows that all lanes have copied.
// Reports: race
// Needs: sm_80
#include "hazard.cuh"

// y: the register of each lane, for the four matrices of 8 x 8 halves one after the other
extern "C" __global__ void cp_async_missing_syncwarp(const uint4* x, uint32_t* y) {
  __shared__ __align__(16) uint4 s[32];
  cp_async(&s[threadIdx.x], &x[threadIdx.x]);
  cp_async_commit();
  cp_async_wait<0>();
  if (!BROKEN) __syncwarp();
  uint32_t r[4];
  ldmatrix(r, &s[threadIdx.x]);  // HAZARD
  for (int i = 0; i < 4; ++i) y[i * 32 + threadIdx.x] = r[i];
}
