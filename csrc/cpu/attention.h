#pragma once
// attention on a CPU: by the kernel of attention_rows.h, or by torch's fused attention, plus what that lacks.
#include "params/attention.h"
#include "torch/check.h"

namespace forwardpass {

// As AttentionParams says, with float32 too, without softcap, and with head_dim == value_dim. q, k, v and out are the
// tensors that p points into.
void attention_cpu(const AttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v, Tensor& out);

}  // namespace forwardpass
