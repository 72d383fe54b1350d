#pragma once
// Every op's torch side, as ops.cpp registers it: one function per op, which is told its backend.
#include "torch/check.h"

namespace forwardpass {

using Quantized =
    std::tuple<Tensor, Tensor, Tensor>;  // q, scale, zero_point; the last two are empty if the caller gave them

Quantized quantize(Backend backend, const Tensor& x, ScalarType dtype, OptionalTensor scale, OptionalTensor zero_point,
                   std::optional<int64_t> group_size, bool symmetric, OptionalTensor channel_scale);

Quantized activation_quantize(Backend backend, const Tensor& x, std::string activation, ScalarType dtype,
                              std::optional<int64_t> group_size, std::string layout, bool symmetric,
                              OptionalTensor channel_scale);

Tensor dequant_activation(Backend backend, const Tensor& acc, OptionalTensor a_scale, OptionalTensor b_scale,
                          OptionalTensor bias, std::optional<std::string> activation, ScalarType out_dtype,
                          OptionalTensor out_scale, OptionalTensor a_zero_point, OptionalTensor b_sum);

Tensor int8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 OptionalTensor bias, std::optional<std::string> activation, ScalarType out_dtype,
                 OptionalTensor out_scale, OptionalTensor a_zero_point, OptionalTensor b_sum);

Tensor int8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& w_scale, OptionalTensor bias,
                   std::optional<std::string> activation, ScalarType out_dtype, OptionalTensor scale,
                   OptionalTensor zero_point, bool symmetric, OptionalTensor channel_scale, OptionalTensor w_sum);

Tensor fp8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                OptionalTensor bias, std::optional<std::string> activation, ScalarType out_dtype,
                OptionalTensor out_scale);

std::tuple<Tensor, Tensor> fp8_gemm_quantize(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                                             const Tensor& b_scale, OptionalTensor bias,
                                             std::optional<std::string> activation, int64_t group_size);

Tensor fp8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& w_scale, OptionalTensor bias,
                  std::optional<std::string> activation, ScalarType out_dtype, OptionalTensor scale,
                  OptionalTensor channel_scale);

Tensor w8a16_gemm(Backend backend, const Tensor& x, const Tensor& w, const Tensor& w_scale, OptionalTensor bias,
                  std::optional<std::string> activation);

Quantized norm_quantize(Backend backend, const Tensor& x, OptionalTensor weight, double eps, ScalarType dtype,
                        std::string kind, OptionalTensor bias, bool symmetric, OptionalTensor channel_scale);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_quantize(Backend backend, const Tensor& x, const Tensor& residual,
                                                             OptionalTensor weight, double eps, ScalarType dtype,
                                                             std::string kind, OptionalTensor bias, bool symmetric,
                                                             OptionalTensor channel_scale);

Tensor attention(Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale,
                 bool causal, std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap,
                 OptionalTensor mask, OptionalTensor alibi_slopes, OptionalTensor sinks, OptionalTensor cu_seqlens_q,
                 OptionalTensor cu_seqlens_k, bool batch_invariant);

std::tuple<Tensor, Tensor> attention_with_lse(Backend backend, const Tensor& q, const Tensor& k, const Tensor& v,
                                              std::optional<double> scale, bool causal,
                                              std::optional<int64_t> window_left, std::optional<int64_t> window_right,
                                              double softcap, OptionalTensor mask, OptionalTensor alibi_slopes,
                                              OptionalTensor sinks, OptionalTensor cu_seqlens_q,
                                              OptionalTensor cu_seqlens_k, bool batch_invariant);

}  // namespace forwardpass
