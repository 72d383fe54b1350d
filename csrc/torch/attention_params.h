#pragma once
// What attention and attention_8bit share: their arguments, checked, and their outputs.
#include <array>

#include "params/attention.h"
#include "torch/attention.h"

namespace forwardpass {

struct AttentionOptions {
  std::optional<double> scale = {};
  bool causal = false;
  std::optional<int64_t> window_left = {}, window_right = {};
  double softcap = 0;
  OptionalTensorRef mask = {}, alibi_slopes = {}, sinks = {}, cu_seqlens_q = {}, cu_seqlens_k = {};
  bool batch_invariant = false;
  std::optional<ScalarType> out_dtype = {};  // of quantised q, k and v
};

// q, k or v: [batch, row, head, dim], varlen: [row, head, dim].
AttentionTensor strides_of(const Tensor& x);

// All of it but the outputs; throws where an argument is none.
AttentionParams attention_params(const char* op, const Tensor& q, const Tensor& k, const Tensor& v,
                                 const AttentionOptions& o);

// o, of a dtype, and the lse where there is one, which p then points to.
Tensor attention_outputs(AttentionParams& p, const Tensor& q, ScalarType dtype, Tensor* lse);

// Writes the result of no sequences, and of rows without keys, which no kernel for GPUs takes; whether it is one of
// them.
bool fill_without_kernel(const AttentionParams& p, OptionalTensorRef sinks, Tensor& out, Tensor* lse);

// Of q, k and v whose base or strides are not as the kernels for GPUs need them. They live until these are launched.
using OperandCopies = std::array<OptionalTensor, 3>;
// Makes p's operands such that those kernels take them; throws where none does.
OperandCopies operands_of_gpu(const char* op, AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v);

// A call whose params are there but for its outputs. on_cpu(out) computes it on a CPU.
template <class Params, class OnCpu>
Tensor run_attention(Backend backend, const char* op, Params& p, const Tensor& q, const Tensor& k, const Tensor& v,
                     const AttentionOptions& o, Tensor* lse, OnCpu on_cpu) {
  Tensor out = attention_outputs(p, q, o.out_dtype.value_or(q.scalar_type()), lse);
  if (out.numel() == 0) return out;
  if (backend == Backend::cpu) {
    on_cpu(out);
    return out;
  }
  if (fill_without_kernel(p, o.sinks, out, lse)) return out;
  const OperandCopies copies = operands_of_gpu(op, p, q, k, v);
  launch_chosen(backend, p, q);
  return out;
}

}  // namespace forwardpass
