#pragma once
#include "cpu/encoder_layer.h"
#include "torch/check.h"

namespace forwardpass {

// Tensors of a linear layer among weights: weight, scale, bias, sum, channel_scale and packed.
constexpr int64_t kOfLayerLinear = 6;

// The linear layer [n, k] whose tensors begin at index i; n 0: of any number of rows. weight_only: its input
// stays as it is.
LayerLinear layer_linear(const std::vector<OptionalTensor>& weights, int64_t i, int64_t n, int64_t k, const Tensor& x,
                         const char* op, bool weight_only = false);

// csrc/cpu/encoder_layer.h says what it computes; the order of `weights` is in encoder_layer.cpp.
Tensor encoder_layer(Backend backend, const Tensor& x, const Tensor& cu_seqlens,
                     const std::vector<std::optional<Tensor>>& weights, int64_t heads, double eps,
                     const std::optional<std::string>& activation, bool pre_norm, std::optional<double> scale,
                     ScalarType attention_dtype, const OptionalTensor& key_lens, const OptionalTensor& score_bias,
                     const std::vector<Tensor>& cos, const std::vector<Tensor>& sin,
                     const std::vector<int64_t>& windows, bool first_norm);

}  // namespace forwardpass
