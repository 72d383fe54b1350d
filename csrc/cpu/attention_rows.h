#pragma once
// Attention on a CPU with AVX-512 or AVX2, hand-written.
#include "params/attention.h"

namespace forwardpass {

// Rows of one batch of sequences against all of their keys. Row i is at position p = first_position + i, and attends to
// keys j with -left <= j - p <= right that the mask lets it.
struct AttentionRows {
  Dtype dtype;                   // f32, f16 or bf16
  AttentionTensor q, k, v, out;  // all rows have the same columns, last stride 1
  float* lse;                    // rows contiguous, heads and batches by strides; or null
  int64_t lse_batch, lse_head;
  const float* mask;  // additive: [rows, keys], keys contiguous, the rest by strides, 0 if it is shared; or null
  int64_t mask_batch, mask_head, mask_row;
  const float* sinks;  // [heads] or null
  int64_t batch, heads, kv_heads, rows, keys, columns;
  float scale;
  int64_t first_position, left, right;
};

// Whether attention_rows runs on this CPU with q, k and v of this dtype and number of columns.
bool has_attention_rows(Dtype dtype, int64_t columns);
// And whether it is faster than torch with so many rows of q.
bool takes_attention_rows(Dtype dtype, int64_t columns, int64_t rows);

// The bits of a row of out depend on that row and on its keys only.
void attention_rows(const AttentionRows& p);
// The same, and the same bits, on the calling thread alone.
void attention_rows_here(const AttentionRows& p);

}  // namespace forwardpass
