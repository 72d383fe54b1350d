// What the kernel library says about the device: the torch side links no cudart.
#include "params/device.h"

#include <cuda_runtime.h>

KERNEL_LIBRARY const char* forwardpass_error_string(int error) {
  return cudaGetErrorString(static_cast<cudaError_t>(error));
}

KERNEL_LIBRARY int forwardpass_capture_mode(int mode) {
  auto exchanged = static_cast<cudaStreamCaptureMode>(mode);
  cudaThreadExchangeStreamCaptureMode(&exchanged);
  return exchanged;
}

int forwardpass_device(forwardpass::Device* device) {
  int index = 0, major = 0, minor = 0, shared = 0, sms = 0;
  if (auto e = cudaGetDevice(&index)) return e;
  if (auto e = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, index)) return e;
  if (auto e = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, index)) return e;
  device->arch = 10 * major + minor;
  if (auto e = cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerMultiprocessor, index)) return e;
  device->shared_kib = shared >> 10;
  if (auto e = cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, index)) return e;
  device->sms = sms, device->index = index;
  return cudaSuccess;
}
