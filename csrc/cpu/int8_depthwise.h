#pragma once
#include "params/int8_conv2d.h"

namespace forwardpass {

// int8_conv2d where each channel is a group with one output. p.epilogue's a_scale is one, or one of each row.
void int8_depthwise_cpu(const Int8Conv2dParams& p);

}  // namespace forwardpass
