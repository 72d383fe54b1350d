#pragma once
// Torch side of what attention and attention_decode share: what they do to scores (scale, softcap, window, sinks,
// ALiBi), checked; and a call on a GPU.
#include <algorithm>
#include <cmath>

#include "torch/ops.h"

namespace forwardpass {

inline int32_t window_side(const std::optional<int64_t>& side, const char* op) {
  STD_TORCH_CHECK(!side || *side >= 0, op, ": each side of a window is at least 0, or None");
  return static_cast<int32_t>(std::min<int64_t>(side.value_or(kUnlimited), kUnlimited));
}

// Fills in p.scale, p.softcap and p.sinks; p.heads is there. dtype: of q before it was quantised.
template <class Params>
void set_scores(Params& p, int64_t head_dim, std::optional<double> scale, double softcap, OptionalTensorRef sinks,
                const Tensor& q, ScalarType dtype, const char* op) {
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(head_dim))));
  STD_TORCH_CHECK(p.scale > 0 && std::isfinite(p.scale), op, ": scale must be positive");
  p.softcap = static_cast<float>(softcap);
  STD_TORCH_CHECK(p.softcap >= 0 && std::isfinite(p.softcap), op, ": softcap must be at least 0");
  if (!sinks) return;
  const ScalarType type = sinks->scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == dtype, op, ": sinks must be float32 or of q's dtype");
  p.sinks = vector<void>(sinks, p.heads, type, q, op, "sinks");
  p.sinks_dtype = dtype_of(type, op, "sinks");
}

// Fills in p.alibi_slopes, [heads] or [batch, heads]; p.heads is there.
template <class Params>
void set_alibi(Params& p, OptionalTensorRef slopes, int64_t batch, const Tensor& q, const char* op) {
  if (!slopes) return;
  const bool per_batch = slopes->dim() == 2;
  if (per_batch) check_sizes(*slopes, {batch, p.heads}, op, "alibi_slopes");
  p.alibi_slopes = per_batch ? elements<float>(slopes, batch * p.heads, ScalarType::Float, q, op, "alibi_slopes")
                             : floats(slopes, p.heads, q, op, "alibi_slopes");
  p.alibi_batch_stride = per_batch ? p.heads : 0;
}

// A call on a GPU: chooses the kernel, allocates the workspace that it takes, if any, and launches it.
template <class Params>
void launch_chosen(Backend backend, Params& p, const Tensor& q) {
  static LibraryFunction<int(const Params*, typename Params::Choice*)> selector(Params::kSelector);
  p.device = device_of(backend, q);
  check_cuda(backend, Params::kSelector, selector.of(backend)(&p, &p.choice));
  OptionalTensor workspace;  // which lives until the kernel is launched
  if (p.choice.workspace_bytes) {
    workspace = contiguous_rows({p.choice.workspace_bytes / 4}, ScalarType::Float, q);
    p.workspace = static_cast<float*>(workspace->mutable_data_ptr());
  }
  launch(backend, p, q);
}

}  // namespace forwardpass
