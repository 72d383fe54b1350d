// A CTA reads the shared memory of the other one of its cluster, and nothing says that it is written.
// Reports: race or uninitialised
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void cluster_missing_barrier(const float* x, float* y) {  // clusters of two CTAs of 64 exchange
  __shared__ float s[64];
  const uint32_t at = blockIdx.x * 64 + threadIdx.x;
  s[threadIdx.x] = x[at];  // HAZARD: where the other CTA read first
  if (BROKEN) {
    __syncthreads();
  } else {
    cluster_sync();
  }
  y[at] = load_of_cta(&s[threadIdx.x], cluster_rank() ^ 1);  // HAZARD
  cluster_sync();
}
