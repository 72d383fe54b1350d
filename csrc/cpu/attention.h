#pragma once
// attention on a CPU: attention_rows.h, or torch's fused attention with what it lacks added around it.
#include "params/attention.h"
#include "torch/check.h"

namespace forwardpass {

// As in AttentionParams, and float32 as well; no softcap, head_dim == value_dim. q, k, v and out are p's tensors.
void attention_cpu(const AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out);

}  // namespace forwardpass
