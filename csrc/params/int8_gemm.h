#pragma once
#include "params/gemm.h"

namespace forwardpass {

struct Int8GemmParams : GemmParams {
  static constexpr const char* kLauncher = "forwardpass_int8_gemm";
  static constexpr const char* kSelector = "forwardpass_select_int8_gemm";
};

}  // namespace forwardpass

KERNEL_LIBRARY forwardpass::KernelSelector forwardpass_select_int8_gemm;
KERNEL_LIBRARY int forwardpass_int8_gemm(const forwardpass::Int8GemmParams* p, void* stream);
