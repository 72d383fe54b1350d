// Every schema and every registration, on one screen. <name>_cpu: csrc/cpu. <name>_cuda: the CUDA kernels; on CPU
// tensors the same kernels, interpreted. <name>_triton: python/forwardpass/ops/<name>/triton_kernel.py, registered
// there.
#include "torch/ops.h"

#include <torch/csrc/stable/library.h>

#include <cstring>

#include "torch/decoder_layer.h"
#include "torch/encoder_layer.h"

namespace forwardpass {
namespace {

// One operation. F is its torch side: a function of the backend and of the schema's arguments.
template <auto F, bool kHasCpuKernel = true, bool kHasGpuKernels = true>
struct Op {
  static constexpr bool kHasCpu = kHasCpuKernel, kHasGpu = kHasGpuKernels;
  const char* schema;

  std::string name(const char* suffix) const { return std::string(schema, std::strchr(schema, '(')) + suffix; }
  std::string definition(const char* suffix) const { return name(suffix) + std::strchr(schema, '('); }

  // F for one backend, in the form that torch calls.
  template <Backend B>
  static constexpr auto boxed() {
    return TORCH_BOX((&OnBackend<B, decltype(F)>::call));
  }

 private:
  template <Backend B, class>
  struct OnBackend;
  template <Backend B, class R, class... Args>
  struct OnBackend<B, R (*)(Backend, Args...)> {
    static R call(Args... args) { return F(B, args...); }
  };
};

// On GPUs only: the CPU has no fp8 arithmetic.
template <auto F>
using GpuOp = Op<F, false>;
// On CPUs only.
template <auto F>
using CpuOp = Op<F, true, false>;

constexpr std::tuple kOps{
    Op<quantize>{
        "quantize(Tensor x, ScalarType dtype, Tensor? scale, Tensor? zero_point, int? group_size, bool symmetric, "
        "Tensor? channel_scale, int? rotate=None) -> (Tensor q, Tensor scale, Tensor zero_point)"},

    Op<activation_quantize>{
        "activation_quantize(Tensor x, str activation, ScalarType dtype, int? group_size, str layout, bool symmetric, "
        "Tensor? channel_scale, int? rotate=None) -> (Tensor q, Tensor scale, Tensor zero_point)"},

    Op<norm_quantize>{
        "norm_quantize(Tensor x, Tensor? weight, float eps, ScalarType dtype, str kind, Tensor? bias, bool symmetric, "
        "Tensor? channel_scale, int? rotate=None, Tensor? ada_scale=None, Tensor? ada_shift=None) -> "
        "(Tensor q, Tensor scale, Tensor zero_point)"},

    Op<add_norm_quantize>{
        "add_norm_quantize(Tensor x, Tensor residual, Tensor? weight, float eps, ScalarType dtype, str kind, "
        "Tensor? bias, bool symmetric, Tensor? channel_scale, int? rotate=None) -> "
        "(Tensor q, Tensor scale, Tensor zero_point, Tensor residual_out)"},

    Op<dequant_activation>{
        "dequant_activation(Tensor acc, Tensor? a_scale, Tensor? b_scale, Tensor? bias, str? activation, "
        "ScalarType out_dtype, Tensor? out_scale, Tensor? a_zero_point, Tensor? b_sum, "
        "Tensor? residual=None, Tensor? ada_gate=None) -> Tensor"},

    Op<int8_gemm>{"int8_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, str? activation, "
                  "ScalarType out_dtype, Tensor? out_scale, Tensor? a_zero_point, Tensor? b_sum, "
                  "Tensor? residual=None, Tensor? ada_gate=None) -> Tensor"},

    Op<int8_gemm_quantize>{
        "int8_gemm_quantize(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, str? activation, "
        "Tensor? a_zero_point, Tensor? b_sum) -> (Tensor q, Tensor scale)"},

    Op<int8_grouped_gemm>{
        "int8_grouped_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor offs, Tensor? bias, "
        "str? activation, ScalarType out_dtype, Tensor? out_scale, Tensor? a_zero_point, Tensor? b_sum) -> Tensor"},

    Op<int8_conv2d>{
        "int8_conv2d(Tensor x, Tensor weight, Tensor x_scale, Tensor weight_scale, int[] stride, int[] padding, "
        "int[] dilation, int groups, Tensor? bias, str? activation, ScalarType out_dtype, "
        "Tensor? out_scale, Tensor? residual=None, bool residual_first=False, Tensor? packed=None) -> Tensor"},

    Op<int8_linear>{"int8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, "
                    "ScalarType out_dtype, Tensor? scale, Tensor? zero_point, bool symmetric, Tensor? channel_scale, "
                    "Tensor? weight_sum, Tensor? packed, Tensor? residual=None, int? rotate=None, Tensor? "
                    "ada_gate=None) -> Tensor"},

    CpuOp<encoder_layer>{
        "encoder_layer(Tensor x, Tensor cu_seqlens, Tensor?[] weights, int heads, float eps, str? activation, "
        "bool pre_norm, float? scale, ScalarType attention_dtype, Tensor? key_lens, Tensor? score_bias, "
        "Tensor[] cos, Tensor[] sin, int[] windows, bool first_norm) -> Tensor"},

    CpuOp<decoder_layer>{
        "decoder_layer(Tensor x, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor seq_lens, Tensor?[] weights, "
        "int heads, Tensor? cos, Tensor? sin, float eps, str? activation, float? scale, Tensor? leftpad, "
        "bool weight_only=False) -> Tensor"},

    Op<w8a16_gemm>{"w8a16_gemm(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, "
                   "Tensor? residual=None, Tensor? ada_gate=None) -> Tensor"},

    Op<w8a16_grouped_gemm>{
        "w8a16_grouped_gemm(Tensor x, Tensor weight, Tensor weight_scale, Tensor offs, Tensor? bias, "
        "str? activation) -> Tensor"},

    Op<permute_quantize>{"permute_quantize(Tensor x, Tensor index, int num_experts, ScalarType dtype, int? group_size, "
                         "Tensor? channel_scale) -> (Tensor q, Tensor scale, Tensor offs, Tensor position)"},

    Op<unpermute>{"unpermute(Tensor y, Tensor position, Tensor weights) -> Tensor"},

    Op<attention<false>>{
        "attention(Tensor q, Tensor k, Tensor v, float? scale, bool causal, int? window_left, int? window_right, "
        "float softcap, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, bool batch_invariant) -> Tensor"},

    Op<attention<true>>{
        "attention_with_lse(Tensor q, Tensor k, Tensor v, float? scale, bool causal, int? window_left, "
        "int? window_right, float softcap, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k, bool batch_invariant) -> (Tensor o, Tensor lse)"},

    Op<attention_8bit<false>>{
        "attention_8bit(Tensor q, Tensor k, Tensor v, str dtype, bool rotates, float? scale, bool causal, "
        "int? window_left, int? window_right, float softcap, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool batch_invariant, Tensor? q_scale=None, Tensor? q_shift=None, "
        "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? v_block_scale=None, ScalarType? out_dtype=None) -> "
        "Tensor"},

    Op<attention_8bit<true>>{
        "attention_8bit_with_lse(Tensor q, Tensor k, Tensor v, str dtype, bool rotates, float? scale, bool causal, "
        "int? window_left, int? window_right, float softcap, Tensor? mask, Tensor? alibi_slopes, Tensor? sinks, "
        "Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, bool batch_invariant, Tensor? q_scale=None, Tensor? q_shift=None, "
        "Tensor? k_scale=None, Tensor? v_scale=None, Tensor? v_block_scale=None, ScalarType? out_dtype=None) -> "
        "(Tensor o, Tensor lse)"},

    Op<quantize_attention>{
        "quantize_attention(Tensor q, Tensor k, Tensor v, str dtype, bool rotates, Tensor? cu_seqlens_q, "
        "Tensor? cu_seqlens_k) -> (Tensor q, Tensor q_scale, Tensor q_shift, Tensor k, Tensor k_scale, Tensor v, "
        "Tensor v_scale, Tensor v_block_scale)"},

    Op<attention_decode<false>>{
        "attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? block_table, "
        "Tensor? k_scale, Tensor? v_scale, float? scale, int? window_left, int? window_right, float softcap, "
        "Tensor? sinks, bool batch_invariant, Tensor? leftpad, Tensor? alibi_slopes) -> Tensor"},

    Op<attention_decode<true>>{
        "attention_decode_with_lse(Tensor q, Tensor k_cache, Tensor v_cache, Tensor seq_lens, Tensor? block_table, "
        "Tensor? k_scale, Tensor? v_scale, float? scale, int? window_left, int? window_right, float softcap, "
        "Tensor? sinks, bool batch_invariant, Tensor? leftpad, Tensor? alibi_slopes) -> (Tensor o, Tensor lse)"},

    Op<append_kv>{
        "append_kv(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor seq_lens, Tensor? block_table, "
        "Tensor(c!)? k_scale, Tensor(d!)? v_scale, Tensor? cos, Tensor? sin, Tensor? q, Tensor(e!)? q_out, "
        "Tensor? q_norm, Tensor? k_norm, float norm_eps, bool interleaved) -> ()"},

    GpuOp<fp8_gemm>{"fp8_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, str? activation, "
                    "ScalarType out_dtype, Tensor? out_scale, Tensor? residual=None, Tensor? ada_gate=None) -> Tensor"},

    GpuOp<fp8_grouped_gemm>{
        "fp8_grouped_gemm(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor offs, Tensor? bias, "
        "str? activation, ScalarType out_dtype, Tensor? out_scale) -> Tensor"},

    GpuOp<fp8_gemm_quantize>{
        "fp8_gemm_quantize(Tensor a, Tensor b, Tensor a_scale, Tensor b_scale, Tensor? bias, str? activation, "
        "int? group_size) -> (Tensor q, Tensor scale)"},

    GpuOp<fp8_linear>{
        "fp8_linear(Tensor x, Tensor weight, Tensor weight_scale, Tensor? bias, str? activation, ScalarType out_dtype, "
        "Tensor? scale, Tensor? channel_scale, Tensor? residual=None, int? rotate=None, Tensor? ada_gate=None) -> "
        "Tensor"},
};

template <class Function>
void for_each_op(Function f) {
  std::apply([&](auto... op) { (f(op), ...); }, kOps);
}

STABLE_TORCH_LIBRARY(forwardpass, m) {
  for_each_op([&](auto op) {
    if (op.kHasCpu) m.def(op.definition("_cpu").c_str());
    if (!op.kHasGpu) return;
    m.def(op.definition("_triton").c_str());
    m.def(op.definition("_cuda").c_str());
  });
  m.def("pack_int8_weight(Tensor weight, bool verify=True) -> Tensor");
  m.def("_cpu_tiers() -> str");
  m.def("_cpu_tier() -> str");
  m.def("_cpu_has_attention(ScalarType dtype, int head_dim, int rows) -> bool");
  m.def("_set_library(int interpreted, str path) -> ()");
  m.def("_set_poison(bool on) -> ()");
  m.def("_set_storage_hook(int address) -> ()");
  m.def("_keep_storage(bool on) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(forwardpass, CPU, m) {
  for_each_op([&](auto op) {
    if constexpr (op.kHasCpu) m.impl(op.name("_cpu").c_str(), op.template boxed<Backend::cpu>());
    if constexpr (op.kHasGpu) m.impl(op.name("_cuda").c_str(), op.template boxed<Backend::interpreted>());
  });
  m.impl("pack_int8_weight", TORCH_BOX(&pack_int8_weight));
}

STABLE_TORCH_LIBRARY_IMPL(forwardpass, CUDA, m) {
  for_each_op([&](auto op) {
    if constexpr (op.kHasGpu) m.impl(op.name("_cuda").c_str(), op.template boxed<Backend::cuda>());
  });
}

STABLE_TORCH_LIBRARY_IMPL(forwardpass, CompositeExplicitAutograd, m) {
  m.impl("_cpu_tiers", TORCH_BOX(&cpu_tiers));
  m.impl("_cpu_tier", TORCH_BOX(&cpu_tier));
  m.impl("_cpu_has_attention", TORCH_BOX(&cpu_has_attention));
  m.impl("_set_library", TORCH_BOX(&set_library));
  m.impl("_set_poison", TORCH_BOX(&set_poison));
  m.impl("_set_storage_hook", TORCH_BOX(&set_storage_hook));
  m.impl("_keep_storage", TORCH_BOX(&keep_storage));
}

}  // namespace
}  // namespace forwardpass
