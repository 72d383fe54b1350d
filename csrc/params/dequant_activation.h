#pragma once
#include "params/common.h"

namespace forwardpass {

struct DequantActivationParams {
  static constexpr const char* kLauncher = "forwardpass_dequant_activation";
  Matrix acc;  // i32, f32, f16 or bf16
  Epilogue epilogue;
};

void dequant_activation_cpu(const DequantActivationParams& p);

// In the kernel library: each accumulator is the sum of `splits` parts, split_stride elements apart. Returns a
// cudaError_t; stream is a cudaStream_t.
int launch_dequant_activation(const DequantActivationParams& p, int64_t splits, int64_t split_stride, void* stream);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_dequant_activation(const forwardpass::DequantActivationParams* p, void* stream);
