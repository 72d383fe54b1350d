#pragma once
// The GPU that a launch goes to. No torch, no CUDA.
#include <cstdint>

namespace forwardpass {

struct Device {
  int32_t sms;   // multiprocessors
  int16_t arch;  // 80, 89, 90, …
  bool wgmma;    // sm_90, and kernels for sm_90a are in this library
};

}  // namespace forwardpass

// Of the current device; returns a cudaError_t.
extern "C" __attribute__((visibility("default"))) int forwardpass_device(forwardpass::Device* device);
