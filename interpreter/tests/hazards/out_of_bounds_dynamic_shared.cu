// Dynamic shared memory is as large as the launch made it, here 64 floats: the store of the 65th has no place.
// Reports: out_of_bounds
// Needs: sm_80
#include "hazard.cuh"

extern "C" __global__ void out_of_bounds_dynamic_shared(const float* x, float* y) {  // y = x shifted by one, the last 0
  extern __shared__ float dynamic[];
  dynamic[threadIdx.x + BROKEN] = x[threadIdx.x];  // HAZARD
  __syncthreads();
  y[threadIdx.x] = threadIdx.x < 63 ? dynamic[threadIdx.x + 1] : 0;
}
