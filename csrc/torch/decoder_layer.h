#pragma once
#include "torch/check.h"

namespace forwardpass {

// csrc/cpu/decoder_layer.h says what it computes; the order of `weights` is in decoder_layer.cpp.
Tensor decoder_layer(Backend backend, const Tensor& x, const std::vector<Tensor>& k_caches,
                     const std::vector<Tensor>& v_caches, const Tensor& seq_lens,
                     const std::vector<OptionalTensor>& weights, int64_t heads, const OptionalTensor& cos,
                     const OptionalTensor& sin, double eps, const std::optional<std::string>& activation,
                     std::optional<double> scale, const OptionalTensor& leftpad, bool weight_only);

}  // namespace forwardpass
