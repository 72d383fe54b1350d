#include "params/attention.h"

#include "cpu/attention.h"
#include "cpu/attention_rows.h"
#include "torch/attention_params.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

Tensor run(Backend backend, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
           const AttentionOptions& o, Tensor* lse) {
  AttentionParams p = attention_params(op, q, k, v, o);
  return run_attention(backend, op, p, q, k, v, o, lse, [&](Tensor& out) { attention_cpu(p, q, k, v, out); });
}

}  // namespace

template <bool kLse>
std::conditional_t<kLse, std::tuple<Tensor, Tensor>, Tensor> attention(
    Backend backend, const Tensor& q, const Tensor& k, const Tensor& v, std::optional<double> scale, bool causal,
    std::optional<int64_t> window_left, std::optional<int64_t> window_right, double softcap, const OptionalTensor& mask,
    const OptionalTensor& alibi_slopes, const OptionalTensor& sinks, const OptionalTensor& cu_seqlens_q,
    const OptionalTensor& cu_seqlens_k, bool batch_invariant) {
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
    Tensor out = run(backend, "attention_with_lse", q, k, v, options, &lse);
    return {out, lse};
  } else {
    return run(backend, "attention", q, k, v, options, nullptr);
  }
}

template decltype(attention<false>) attention<false>;
template decltype(attention<true>) attention<true>;

// Whether the CPU has a kernel by hand for it, which is faster than torch's attention.
bool cpu_has_attention(ScalarType dtype, int64_t head_dim, int64_t rows) {
  return takes_attention_rows(dtype_of(dtype, "attention", "q"), head_dim, rows);
}

}  // namespace forwardpass
