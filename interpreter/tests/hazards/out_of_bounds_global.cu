// The last thread's neighbour is one element beyond the tensor.
// Reports: out_of_bounds
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void out_of_bounds_global(const float* x, float* y,
                                                int n) {  // y[n] = x[i + 1] - x[i], the last 0
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  float difference = 0;
  if (i < n - 1 + BROKEN) difference = x[i + 1] - x[i];  // HAZARD
  if (i < n) y[i] = difference;
}
