#pragma once
// The GPU that a launch goes to. No torch, no CUDA.
#include "params/common.h"

namespace forwardpass {

struct Device {
  int16_t sms, index;  // multiprocessors; index: cudart's
  int16_t arch;        // 80, 89, 90, …
  int16_t shared_kib;  // shared memory of a multiprocessor
};

}  // namespace forwardpass

// Of the current device; returns a cudaError_t.
KERNEL_LIBRARY int forwardpass_device(forwardpass::Device* device);
