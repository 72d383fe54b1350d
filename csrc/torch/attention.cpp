#include "params/attention.h"

#include <array>

#include "cpu/attention.h"
#include "cpu/attention_rows.h"
#include "torch/attention.h"
#include "torch/attention_params.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

// Whether base and strides are as the kernels need them.
bool is_aligned(const AttentionTensor& t, Dtype dtype) {
  return reinterpret_cast<uintptr_t>(t.data) % 16 == 0 && (t.batch | t.row | t.head) * size_of(dtype) % 16 == 0;
}

bool has_kernel(int32_t head_dim, int32_t value_dim) {
  if (head_dim == value_dim) return head_dim % 8 == 0 && head_dim >= 32 && head_dim <= 256;
  return head_dim == 192 && value_dim == 128;
}

Tensor run(Backend backend, const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
           const AttentionOptions& o, Tensor* lse) {
  AttentionParams p = attention_params(op, q, k, v, o);
  Tensor out = attention_outputs(p, q, lse);
  if (out.numel() == 0) return out;
  if (backend == Backend::cpu) {
    attention_cpu(p, q, k, v, out);
    return out;
  }
  if (fill_without_kernel(p, o.sinks, out, lse)) return out;
  STD_TORCH_CHECK(p.dtype != Dtype::f32, op, ": on a GPU q must be float16 or bfloat16");
  STD_TORCH_CHECK(has_kernel(p.head_dim, p.value_dim), op,
                  ": on a GPU head dims are a multiple of 8 from 32 to 256, or ", "192 with 128 of v, not ", p.head_dim,
                  " with ", p.value_dim);
  std::array<OptionalTensor, 3> copies;  // which live until the kernel is launched
  AttentionTensor* operands[] = {&p.q, &p.k, &p.v};
  const Tensor* tensors[] = {&q, &k, &v};
  for (int i = 0; i < 3; ++i) {
    if (is_aligned(*operands[i], p.dtype)) continue;
    copies[i] = contiguous_rows(sizes_of(*tensors[i]), q.scalar_type(), q);
    torch::stable::copy_(*copies[i], *tensors[i]);
    *operands[i] = strides_of(*copies[i]);
  }
  if (p.keys == 0) p.k = p.v = p.q;  // what cu_seqlens say is still looked at; of keys nothing is read
  launch_chosen(backend, p, q);
  return out;
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
