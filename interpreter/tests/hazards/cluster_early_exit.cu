// A CTA exits while the other one of its cluster may still read its shared memory.
// Reports: race or out_of_bounds
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void cluster_early_exit(const float* x, float* y) {  // clusters of two CTAs of 64 exchange
  __shared__ float s[64];
  const uint32_t at = blockIdx.x * 64 + threadIdx.x;
  s[threadIdx.x] = x[at];
  cluster_sync();
  y[at] = load_of_cta(&s[threadIdx.x], cluster_rank() ^ 1);  // HAZARD: where the other CTA has exited
  if (!BROKEN) cluster_sync();
}  // HAZARD
