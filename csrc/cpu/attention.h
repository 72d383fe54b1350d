#pragma once
// attention on a CPU: attention_rows.h's, or torch's fused one with what it lacks around it.
#include "params/attention.h"
#include "torch/check.h"

namespace forwardpass {

// As AttentionParams has it, with float32 too; no softcap, head_dim == value_dim. q, k, v and out are p's tensors.
void attention_cpu(const AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out);

}  // namespace forwardpass
