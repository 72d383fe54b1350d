#include "params/attention_8bit.h"

#include "cpu/attention_8bit.h"
#include "torch/attention_params.h"

namespace forwardpass {
namespace {

constexpr int32_t kMostColumns = 1 << 17;  // whose products an int32 sums

Tensor run_8bit(Backend backend, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                const std::string& dtype, bool rotates, const AttentionOptions& o, Tensor* lse) {
  STD_TORCH_CHECK(dtype == "int8" || dtype == "fp8", op, ": dtype must be int8 or fp8, not ", dtype);
  Attention8bitParams p{attention_params(op, q, k, v, o), dtype == "fp8", rotates};
  STD_TORCH_CHECK(!p.fp8 || backend != Backend::cpu, op, ": no CPU multiplies e4m3");
  STD_TORCH_CHECK(p.head_dim <= kMostColumns, op, ": q and k must have at most ", kMostColumns, " columns, not ",
                  p.head_dim);
  return run_attention(backend, op, p, q, k, v, o.sinks, lse, [&](Tensor&) { attention_8bit_cpu(p, rotates); });
}

}  // namespace

template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention_8bit(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, const std::string& dtype, bool rotates,
    std::optional<double> scale, bool causal, std::optional<int64_t> window_left, std::optional<int64_t> window_right,
    double softcap, const OptionalTensor& mask, const OptionalTensor& alibi_slopes, const OptionalTensor& sinks,
    const OptionalTensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool batch_invariant) {
  const AttentionOptions options{.scale = scale,
                                 .causal = causal,
                                 .window_left = window_left,
                                 .window_right = window_right,
                                 .softcap = softcap,
                                 .mask = mask,
                                 .alibi_slopes = alibi_slopes,
                                 .sinks = sinks,
                                 .cu_seqlens_q = cu_seqlens_q,
                                 .cu_seqlens_k = cu_seqlens_k,
                                 .batch_invariant = batch_invariant};
  if constexpr (kLse) {
    Tensor lse;
    Tensor out = run_8bit(backend, "attention_8bit_with_lse", q, k, v, dtype, rotates, options, &lse);
    return {out, lse};
  } else {
    return run_8bit(backend, "attention_8bit", q, k, v, dtype, rotates, options, nullptr);
  }
}

template decltype(attention_8bit<false>) attention_8bit<false>;
template decltype(attention_8bit<true>) attention_8bit<true>;

}  // namespace forwardpass
