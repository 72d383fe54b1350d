#pragma once
#include "params/gemm.h"

namespace forwardpass {

struct Int8GroupedGemmParams : GemmParams {
  static constexpr const char* kLauncher = "forwardpass_int8_grouped_gemm";
  static constexpr const char* kSelector = "forwardpass_select_int8_grouped_gemm";
};

}  // namespace forwardpass

KERNEL_LIBRARY forwardpass::KernelSelector forwardpass_select_int8_grouped_gemm;
KERNEL_LIBRARY int forwardpass_int8_grouped_gemm(const forwardpass::Int8GroupedGemmParams* p, void* stream);
