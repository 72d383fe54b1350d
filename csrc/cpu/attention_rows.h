#pragma once
// Attention of fp32 tensors on a CPU with AVX-512, by hand.
#include "params/attention.h"

namespace forwardpass {

// Rows of one batch of sequences against all of their keys. Row i stands at `place` + i, and of keys j it sees
// -left <= j - (place + i) <= right, as far as the mask lets it.
struct AttentionRows {
  AttentionTensor q, k, v, out;  // fp32; all rows have the same columns, last stride 1
  float* lse;                    // one behind the other, heads and batches by strides; or null
  int64_t lse_batch, lse_head;
  const float* mask;  // [rows, keys] contiguous, heads and batches by strides, 0 where one serves all; added; or null
  int64_t mask_batch, mask_head;
  const float* sinks;  // [heads] or null
  int64_t batch, heads, kv_heads, rows, keys, columns;
  float scale;
  int64_t place, left, right;
};

// Whether this CPU and these columns, of q, k and v alike, are what attention_rows takes.
bool takes_attention_rows(int64_t columns);

// A row's bits depend on nothing but the row and its keys.
void attention_rows(const AttentionRows& p);

}  // namespace forwardpass
