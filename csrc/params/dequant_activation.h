#pragma once
#include "params/common.h"

namespace forwardpass {

struct DequantActivationParams {
  static constexpr const char* kLauncher = "forwardpass_dequant_activation";
  Matrix acc;  // i32, f32, f16 or bf16
  Epilogue epilogue;
};

void dequant_activation_cpu(const DequantActivationParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_dequant_activation(const forwardpass::DequantActivationParams* p, void* stream);
