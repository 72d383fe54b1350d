#pragma once
#include "params/gemm.h"

namespace forwardpass {

struct Fp8GroupedGemmParams : GemmParams {
  static constexpr const char* kLauncher = "forwardpass_fp8_grouped_gemm";
  static constexpr const char* kSelector = "forwardpass_select_fp8_grouped_gemm";
};

}  // namespace forwardpass

KERNEL_LIBRARY forwardpass::KernelSelector forwardpass_select_fp8_grouped_gemm;
KERNEL_LIBRARY int forwardpass_fp8_grouped_gemm(const forwardpass::Fp8GroupedGemmParams* p, void* stream);
