#pragma once
#include "params/gemm.h"

namespace forwardpass {

struct Fp8GemmParams : GemmParams {};

}  // namespace forwardpass

// returns a cudaError_t; stream is a cudaStream_t
extern "C" __attribute__((visibility("default"))) int forwardpass_fp8_gemm(const forwardpass::Fp8GemmParams* p,
                                                                           void* stream);
