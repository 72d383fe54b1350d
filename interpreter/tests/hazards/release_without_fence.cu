// Atomics are relaxed: what a block wrote before one is released to the others by a fence between the two, which a
// barrier of the block does not replace.
// Reports: race
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void release_without_fence(const float* x, float* y, float* partial, unsigned* finished) {
  __shared__ bool last;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  __syncthreads();
  if (threadIdx.x == 0) {
    if (!BROKEN) __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (int block = 0; block < gridDim.x; ++block) sum += partial[block * blockDim.x + threadIdx.x];  // HAZARD
  y[threadIdx.x] = sum;
}
