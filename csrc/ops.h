#pragma once
// Every op's torch side, as ops.cpp registers it: one function an op, told which backend it runs on.
#include "check.h"

namespace forwardpass {

using Quantized = std::tuple<Tensor, Tensor, Tensor>;  // q, scale, zero_point; the last two empty where they are the caller's

Quantized quantize(Backend backend, const Tensor& x, ScalarType dtype, OptionalTensor scale, OptionalTensor zero_point,
                   std::optional<int64_t> group_size, bool symmetric, OptionalTensor channel_scale);

Quantized norm_quantize(Backend backend, const Tensor& x, OptionalTensor weight, double eps, ScalarType dtype, std::string kind,
                        OptionalTensor bias, bool symmetric, OptionalTensor channel_scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_quantize(Backend backend, const Tensor& x, const Tensor& residual, OptionalTensor weight,
                                                             double eps, ScalarType dtype, std::string kind, OptionalTensor bias,
                                                             bool symmetric, OptionalTensor channel_scale);

}  // namespace forwardpass
