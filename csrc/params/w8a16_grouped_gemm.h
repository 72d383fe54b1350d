#pragma once
#include "params/gemm.h"

namespace forwardpass {

// a: f16 or bf16; b: i8 or e4m3, whose scales are the epilogue's.
struct W8a16GroupedGemmParams : GemmParams {
  static constexpr const char* kLauncher = "forwardpass_w8a16_grouped_gemm";
  static constexpr const char* kSelector = "forwardpass_select_w8a16_grouped_gemm";
};

}  // namespace forwardpass

KERNEL_LIBRARY forwardpass::KernelSelector forwardpass_select_w8a16_grouped_gemm;
KERNEL_LIBRARY int forwardpass_w8a16_grouped_gemm(const forwardpass::W8a16GroupedGemmParams* p, void* stream);
