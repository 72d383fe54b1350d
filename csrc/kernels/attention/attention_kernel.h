#pragma once
#include <cuda_runtime.h>

#include "kernels/registry.h"
#include "params/attention.h"

namespace forwardpass {

struct AttentionKernel {
  Arch arch;
  cudaError_t (*launch)(const AttentionParams& p, cudaStream_t stream);
};

using AttentionKernels = Registered<AttentionParams, AttentionKernel>;

}  // namespace forwardpass
