// The last block to finish adds up what all have written. Thread 0 of each says that its block has finished, for which
// a barrier must come first: a fence and an atomic release what the thread knows to have been written, no more.
// Reports: race
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void release_before_barrier(const float* x, float* y, float* partial, unsigned* finished) {
  __shared__ bool last;
  partial[blockIdx.x * blockDim.x + threadIdx.x] = x[blockIdx.x * blockDim.x + threadIdx.x];
  if (!BROKEN) __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1) == gridDim.x - 1;
    __threadfence();
  }
  __syncthreads();
  if (!last) return;
  float sum = 0;
  for (int block = 0; block < gridDim.x; ++block) sum += partial[block * blockDim.x + threadIdx.x];  // HAZARD
  y[threadIdx.x] = sum;
}
