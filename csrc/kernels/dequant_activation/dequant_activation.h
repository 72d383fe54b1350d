#pragma once
// dequant_activation as the GEMMs launch it too.
#include <cuda_runtime.h>

#include "params/dequant_activation.h"

namespace forwardpass {

// Each accumulator is the sum of `splits` parts, split_stride elements apart. arch: of the device, where the launch may
// be a dependent one.
cudaError_t launch_dequant_activation(const DequantActivationParams& p, int64_t splits, int64_t split_stride,
                                      cudaStream_t stream, int arch = 0);

}  // namespace forwardpass
