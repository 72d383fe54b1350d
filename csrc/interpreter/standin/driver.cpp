// The driver's functions that programs call by name (CUTLASS fills with patterns wider than a byte), where cudart's do
// not suffice. Linked like cudart's: a program needs no -lcuda.
#include <cuda.h>

#include "standin.h"

using namespace forwardpass::standin;

namespace {

template <class T>
CUresult fill(CUdeviceptr to, T value, size_t count, CUstream stream) {
  const auto begin = reinterpret_cast<T*>(to);
  const bool fits = to % sizeof(T) == 0 && fpi_storage_find(begin, static_cast<int64_t>(count * sizeof(T)));
  if (count && !fits) return static_cast<CUresult>(finish(cudaErrorInvalidValue));
  return static_cast<CUresult>(enqueue(stream, [=] {
    for (size_t i = 0; i < count; ++i) begin[i] = value;
    return finish(cudaSuccess);
  }));
}

}  // namespace

extern "C" {

CUresult cuMemsetD8Async(CUdeviceptr to, unsigned char value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}
CUresult cuMemsetD16Async(CUdeviceptr to, unsigned short value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}
CUresult cuMemsetD32Async(CUdeviceptr to, unsigned value, size_t count, CUstream stream) {
  return fill(to, value, count, stream);
}

// The codes of the driver that the stand-in returns are cudart's.
CUresult cuGetErrorString(CUresult error, const char** text) {
  *text = cudaGetErrorString(static_cast<cudaError_t>(error));
  return CUDA_SUCCESS;
}

}  // extern "C"
