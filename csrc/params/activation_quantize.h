#pragma once
#include "params/common.h"

namespace forwardpass {

struct ActivationQuantizeParams {
  static constexpr const char* kLauncher = "forwardpass_activation_quantize";
  Matrix x;  // [rows, columns], or [rows, 2 columns] of gate and up where the activation is gated
  Activation activation;
  bool interleaved;  // 8 columns of gate, 8 of up, and so on; else the halves
  QuantizedRows out;
};

void activation_quantize_cpu(const ActivationQuantizeParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_activation_quantize(const forwardpass::ActivationQuantizeParams* p, void* stream);
