// A kernel started by programmatic dependent launch touches what the kernel before it writes.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void producer(const float* x, float* y) {  // y[256] = 2 * x
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  griddepcontrol_launch_dependents();
  y[i] = 2 * x[i];
}

extern "C" __global__ void missing_griddepcontrol_wait(const float* y, float* z) {  // z[256] = y reversed
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (!BROKEN) griddepcontrol_wait();
  z[i] = y[255 - i];  // HAZARD
}
