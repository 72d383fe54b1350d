#pragma once
#include "params/gemm.h"

namespace forwardpass {

struct Int8GemmParams : GemmParams {
  static constexpr const char* kLauncher = "forwardpass_int8_gemm";
};

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_int8_gemm(const forwardpass::Int8GemmParams* p, void* stream);
