#pragma once
#include "params/dequant_activation.h"

namespace forwardpass {

// dequant_activation_cpu of outputs that are whole rows, whose quantisation follows.
void quantize_outputs(const DequantActivationParams& p);

}  // namespace forwardpass
