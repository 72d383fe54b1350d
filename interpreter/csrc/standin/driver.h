#pragma once
// What the files of the driver's functions share. Linked like cudart's: a program needs no -lcuda, and may have it.
// Nothing is done here that cudart's functions do: a function of the driver calls cudart's, and turns the code that it
// returns.
#include <cuda.h>

#include "standin.h"

namespace gpuless::standin {

// What cudart alone has a code for; all others are the driver's too.
constexpr CUresult driver_code(cudaError_t error) {
  switch (error) {
    case cudaErrorInvalidConfiguration:
    case cudaErrorInvalidPitchValue:
    case cudaErrorInvalidDevicePointer:
    case cudaErrorInvalidMemcpyDirection:
      return CUDA_ERROR_INVALID_VALUE;
    case cudaErrorInvalidSymbol:
      return CUDA_ERROR_NOT_FOUND;
    case cudaErrorInvalidDeviceFunction:
      return CUDA_ERROR_INVALID_HANDLE;
    default:
      return static_cast<CUresult>(error);
  }
}

// The driver's functions leave cudaGetLastError() as it is.
template <class F>
CUresult driver(F call) {
  const SameLastError same;
  return driver_code(static_cast<cudaError_t>(call()));
}

// There is one context, the device's own, whoever makes how many.
CUcontext the_context();

inline void* pointer(CUdeviceptr address) { return reinterpret_cast<void*>(address); }

}  // namespace gpuless::standin
