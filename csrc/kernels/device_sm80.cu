// What the kernel library says about itself and the device: the torch side links no cudart.
#include <cuda_runtime.h>

#include "params/gemm.h"

KERNEL_LIBRARY const char* forwardpass_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

// kernels/int8_gemm/int8_gemm_sm90a.cu, if the library is built for sm_90a
namespace forwardpass {
cudaError_t __attribute__((weak)) int8_gemm_sm90a(const GemmParams& p, cudaStream_t stream);
}

int forwardpass_device(forwardpass::Device* device) {
  int index = 0, major = 0, minor = 0;
  if (auto e = cudaGetDevice(&index)) return e;
  if (auto e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)) return e;
  if (auto e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index)) return e;
  device->arch = 10 * major + minor;
  device->wgmma = device->arch == 90 && forwardpass::int8_gemm_sm90a;
  return cudaDeviceGetAttribute(&device->sms, cudaDevAttrMultiProcessorCount, index);
}
