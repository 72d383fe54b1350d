#pragma once
#include "params/dequant_activation.h"

namespace forwardpass {

// dequant_activation_cpu where a residual follows the activation or, of outputs that are whole rows, a quantisation.
void finish_rows(const DequantActivationParams& p);

}  // namespace forwardpass
