#pragma once
#include "params/common.h"

namespace forwardpass {

struct QuantizeParams {
  static constexpr const char* kLauncher = "forwardpass_quantize";
  Matrix x;
  QuantizedRows out;
};

void quantize_cpu(const QuantizeParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_quantize(const forwardpass::QuantizeParams* p, void* stream);
