/* A library with NVIDIA's cudart linked into it, as CuPy and the CuTe DSL have it. */
#include <cuda_runtime_api.h>

int device_count(void) {
  int count;
  return cudaGetDeviceCount(&count);
}
