#pragma once
// Every op's torch side, as ops.cpp registers it: one function per op, which is told its backend.
#include "torch/check.h"

namespace forwardpass {

// q, scale, zero_point. A static scale or zero_point is empty here, and so is the zero_point of a symmetric q.
using Quantized = std::tuple<Tensor, Tensor, Tensor>;

Quantized quantize(Backend backend, const Tensor& x, ScalarType dtype, const OptionalTensor& scale,
                   const OptionalTensor& zero_point, std::optional<int64_t> group_size, bool symmetric,
                   const OptionalTensor& channel_scale, std::optional<int64_t> rotate);

// q, scale, offs, position.
std::tuple<Tensor, Tensor, Tensor, Tensor> permute_quantize(Backend backend, const Tensor& x, const Tensor& index,
                                                            int64_t num_experts, ScalarType dtype,
                                                            std::optional<int64_t> group_size,
                                                            const OptionalTensor& channel_scale);
Tensor unpermute(Backend backend, const Tensor& y, const Tensor& position, const Tensor& weights);

Quantized activation_quantize(Backend backend, const Tensor& x, const std::string& activation, ScalarType dtype,
                              std::optional<int64_t> group_size, const std::string& layout, bool symmetric,
                              const OptionalTensor& channel_scale, std::optional<int64_t> rotate);

Tensor dequant_activation(Backend backend, const Tensor& acc, const OptionalTensor& a_scale,
                          const OptionalTensor& b_scale, const OptionalTensor& bias,
                          const std::optional<std::string>& activation, ScalarType out_dtype,
                          const OptionalTensor& out_scale, const OptionalTensor& a_zero_point,
                          const OptionalTensor& b_sum, const OptionalTensor& residual, const OptionalTensor& ada_gate);

Tensor int8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                 const OptionalTensor& out_scale, const OptionalTensor& a_zero_point, const OptionalTensor& b_sum,
                 const OptionalTensor& residual, const OptionalTensor& ada_gate);

std::tuple<Tensor, Tensor> int8_gemm_quantize(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                                              const Tensor& b_scale, const OptionalTensor& bias,
                                              const std::optional<std::string>& activation,
                                              const OptionalTensor& a_zero_point, const OptionalTensor& b_sum);

Tensor int8_grouped_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                         const Tensor& b_scale, const Tensor& offs, const OptionalTensor& bias,
                         const std::optional<std::string>& activation, ScalarType out_dtype,
                         const OptionalTensor& out_scale, const OptionalTensor& a_zero_point,
                         const OptionalTensor& b_sum);

Tensor int8_conv2d(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& x_scale,
                   const Tensor& weight_scale, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups, const OptionalTensor& bias,
                   const std::optional<std::string>& activation, ScalarType out_dtype, const OptionalTensor& out_scale,
                   const OptionalTensor& residual, bool residual_first, const OptionalTensor& packed);

Tensor int8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                   const OptionalTensor& scale, const OptionalTensor& zero_point, bool symmetric,
                   const OptionalTensor& channel_scale, const OptionalTensor& weight_sum, const OptionalTensor& packed,
                   const OptionalTensor& residual, std::optional<int64_t> rotate, const OptionalTensor& ada_gate);

// weight as the int8 GEMM of this CPU reads it, int8; empty where it reads it as it is. Without `verify` it is used
// without a look at the weight.
Tensor pack_int8_weight(const Tensor& weight, bool verify);
// The names of the tiers that the CPU kernels may use, in rising order with commas, and of the one that they use.
std::string cpu_tiers();
std::string cpu_tier();
bool cpu_has_attention(ScalarType dtype, int64_t head_dim, int64_t rows);

Tensor fp8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                const OptionalTensor& out_scale, const OptionalTensor& residual, const OptionalTensor& ada_gate);

Tensor fp8_grouped_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                        const Tensor& offs, const OptionalTensor& bias, const std::optional<std::string>& activation,
                        ScalarType out_dtype, const OptionalTensor& out_scale);

std::tuple<Tensor, Tensor> fp8_gemm_quantize(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                                             const Tensor& b_scale, const OptionalTensor& bias,
                                             const std::optional<std::string>& activation,
                                             std::optional<int64_t> group_size);

Tensor fp8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                  const OptionalTensor& scale, const OptionalTensor& channel_scale, const OptionalTensor& residual,
                  std::optional<int64_t> rotate, const OptionalTensor& ada_gate);

Tensor w8a16_gemm(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  const OptionalTensor& bias, const std::optional<std::string>& activation,
                  const OptionalTensor& residual, const OptionalTensor& ada_gate);

Tensor w8a16_grouped_gemm(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const Tensor& offs, const OptionalTensor& bias, const std::optional<std::string>& activation);

Quantized norm_quantize(Backend backend, const Tensor& x, const OptionalTensor& weight, double eps, ScalarType dtype,
                        const std::string& kind, const OptionalTensor& bias, bool symmetric,
                        const OptionalTensor& channel_scale, std::optional<int64_t> rotate,
                        const OptionalTensor& ada_scale, const OptionalTensor& ada_shift);

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_quantize(Backend backend, const Tensor& x, const Tensor& residual,
                                                             const OptionalTensor& weight, double eps, ScalarType dtype,
                                                             const std::string& kind, const OptionalTensor& bias,
                                                             bool symmetric, const OptionalTensor& channel_scale,
                                                             std::optional<int64_t> rotate);

// o or, as attention_with_lse, o and lse.
template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale, bool causal,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap, const OptionalTensor& mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, bool batch_invariant);

// o or, as attention_8bit_with_lse, o and lse.
template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention_8bit(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, const std::string& dtype, bool rotates,
    std::optional<double> scale, bool causal, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softcap, const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool batch_invariant,
    const OptionalTensor& q_scale, const OptionalTensor& q_shift, const OptionalTensor& k_scale,
    const OptionalTensor& v_scale, const OptionalTensor& v_block_scale, std::optional<ScalarType> out_dtype);

// q, q_scale, q_shift, k, k_scale, v, v_scale, v_block_scale.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> quantize_attention(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, const std::string& dtype, bool rotates,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k);

// o or, as attention_decode_with_lse, o and lse.
template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention_decode(
    Backend backend, const Tensor& q, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
    const OptionalTensor& block_table, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
    std::optional<double> scale, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softcap, const OptionalTensor& sinks, bool batch_invariant, const OptionalTensor& leftpad,
    const OptionalTensor& alibi_slopes);

void append_kv(Backend backend, const Tensor& k, const Tensor& v, const Tensor& k_cache, const Tensor& v_cache,
               const Tensor& seq_lens, const OptionalTensor& block_table, const OptionalTensor& k_scale,
               const OptionalTensor& v_scale, const OptionalTensor& cos, const OptionalTensor& sin,
               const OptionalTensor& q, const OptionalTensor& q_out, const OptionalTensor& q_norm,
               const OptionalTensor& k_norm, double norm_eps, bool interleaved);

}  // namespace forwardpass
