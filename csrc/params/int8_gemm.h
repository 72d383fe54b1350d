#pragma once
#include "params/gemm.h"

namespace forwardpass {

struct Int8GemmParams : GemmParams {};

}  // namespace forwardpass

// returns a cudaError_t; stream is a cudaStream_t
extern "C" __attribute__((visibility("default"))) int forwardpass_int8_gemm(const forwardpass::Int8GemmParams* p,
                                                                            void* stream);
