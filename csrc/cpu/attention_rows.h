#pragma once
// Attention in fp32 on a CPU with AVX-512, hand-written.
#include "params/attention.h"

namespace forwardpass {

// Rows of one batch of sequences against all of their keys. Row i is at position p = first_position + i, and attends to
// keys j with -left <= j - p <= right that the mask lets it.
struct AttentionRows {
  AttentionTensor q, k, v, out;  // fp32; all rows have the same columns, last stride 1
  float* lse;                    // rows contiguous, heads and batches by strides; or null
  int64_t lse_batch, lse_head;
  const float* mask;  // additive: [rows, keys] contiguous, heads and batches by strides, 0 if they share it; or null
  int64_t mask_batch, mask_head;
  const float* sinks;  // [heads] or null
  int64_t batch, heads, kv_heads, rows, keys, columns;
  float scale;
  int64_t first_position, left, right;
};

// Whether attention_rows runs on this CPU, with this number of columns of q, k and v.
bool takes_attention_rows(int64_t columns);

// The bits of a row of out depend on that row and on its keys only.
void attention_rows(const AttentionRows& p);

}  // namespace forwardpass
