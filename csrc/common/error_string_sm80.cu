// The kernel library's own words for its error codes; the torch side links no cudart.
#include <cuda_runtime.h>

extern "C" __attribute__((visibility("default"))) const char* forwardpass_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}
