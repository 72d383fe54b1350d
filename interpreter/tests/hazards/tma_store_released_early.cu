// The last block to finish adds up what all have stored by TMA. Thread 0 of each waits until its store has read shared
// memory, which is not that it has written global memory, and says that its block has finished.
// Reports: in_flight
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void tma_store_released_early(const float* x, float* y, const float* partial,
                                                    const __grid_constant__ TensorMap rows, unsigned* finished) {
  __shared__ alignas(128) float s[256];
  __shared__ bool last;
  s[threadIdx.x] = x[blockIdx.x * 256 + threadIdx.x];
  fence_proxy_async();
  __syncthreads();
  if (threadIdx.x == 0) {
    tma_store(rows, 0, blockIdx.x * 8, s);
    bulk_commit();
    if (BROKEN) {
      bulk_wait_read<0>();
    } else {
      bulk_wait<0>();
    }
    __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (int block = 0; block < gridDim.x; ++block) sum += partial[block * 256 + threadIdx.x];  // HAZARD
  y[threadIdx.x] = sum;
}
