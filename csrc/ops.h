#pragma once
// Every op's torch side, as ops.cpp registers it: one function an op, told which backend it runs on.
#include "check.h"

namespace forwardpass {

using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // q, scale, zero_point; the last two empty where they are the caller's

Quantized quantize(Backend backend, const Tensor& x, ScalarType dtype, OptionalTensor scale, OptionalTensor zero_point,
                   std::optional<int64_t> group_size, bool symmetric, OptionalTensor channel_scale);

}  // namespace forwardpass
