// A block ends while TMA may still read its shared memory: the wait is for all groups but the only one.
// Reports: in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_store_unfinished(const float* x,
                                                const __grid_constant__ TensorMap y) {  // y = x [8, 32]
  __shared__ alignas(128) float s[256];
  s[threadIdx.x] = x[threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(y, 0, 0, s);  // HAZARD
    bulk_commit();
    bulk_wait_read<BROKEN>();
  }
}
