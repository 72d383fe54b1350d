#pragma once
#include "params/common.h"

namespace forwardpass {

struct QuantizeParams {
  Matrix x;
  QuantizedRows out;
};

void quantize_cpu(const QuantizeParams& p);

}  // namespace forwardpass

// returns a cudaError_t; stream is a cudaStream_t
extern "C" __attribute__((visibility("default"))) int forwardpass_quantize(const forwardpass::QuantizeParams* p,
                                                                           void* stream);
