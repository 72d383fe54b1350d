#pragma once
// Checks of a cache of keys and values, for attention_decode and append_kv.
#include "params/attention.h"
#include "params/kv_cache.h"
#include "torch/check.h"

namespace forwardpass {

// New rows of sequences, [batch, row, head, dim].
AttentionTensor new_rows(const Tensor& x, const char* op, const char* name);

// The cache for the tokens x [batch, row, head, dim], on its device.
KvCache kv_cache(const Tensor& x, const Tensor& k_cache, const Tensor& v_cache, const Tensor& seq_lens,
                 const OptionalTensor& block_table, const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                 const char* op);

}  // namespace forwardpass
