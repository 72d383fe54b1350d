// A kernel started by programmatic dependent launch reads through the read-only path what the kernel before it writes:
// it waits first, but has begun while that one was still writing.
// Reports: race
// Needs: sm_90a
#include "hazard.cuh"

extern "C" __global__ void producer(const float* x, float* y) {  // y[256] = 2 * x
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  griddepcontrol_launch_dependents();
  y[i] = 2 * x[i];
}

extern "C" __global__ void read_only_load_of_earlier_kernel(const float* y, float* z) {  // z[256] = y reversed
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  griddepcontrol_wait();
  z[i] = BROKEN ? __ldg(y + 255 - i) : y[255 - i];  // HAZARD
}
