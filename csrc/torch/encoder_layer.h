#pragma once
#include "torch/check.h"

namespace forwardpass {

// csrc/cpu/encoder_layer.h says what it computes; the order of `weights` is in encoder_layer.cpp.
Tensor encoder_layer(Backend backend, const Tensor& x, const Tensor& cu_seqlens,
                     const std::vector<std::optional<Tensor>>& weights, int64_t heads, double eps,
                     const std::optional<std::string>& activation, bool pre_norm, std::optional<double> scale,
                     ScalarType attention_dtype, const OptionalTensor& key_lens);

}  // namespace forwardpass
