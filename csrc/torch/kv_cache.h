#pragma once
// Checks of a cache of keys and values, for attention_decode and append_kv.
#include <algorithm>

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

// On a CPU: whether lengths are within the cache, and pages of each sequence's tokens from first(sequence) on exist.
template <class F>
void check_lengths(const KvCache& c, F first, const char* op) {
  for (int64_t b = 0; b < c.batch; ++b) {
    const int64_t length = c.seq_lens[b];
    STD_TORCH_CHECK(length >= 0 && length <= c.capacity(), op, ": seq_lens must be from 0 to ", c.capacity(),
                    ", the cache's rows, and of sequence ", b, " is ", length);
    if (!c.block_table) continue;
    const int64_t begin = std::max<int64_t>(first(b), 0);
    for (int64_t n = begin / c.page; begin < length && n * c.page < length; ++n) {
      const int32_t page = c.block_table[b * c.table_stride + n];
      STD_TORCH_CHECK(page >= 0 && page < c.pages, op, ": block_table must name pages below ", c.pages,
                      " for what a sequence has, and entry ", n, " of sequence ", b, " is ", page);
    }
  }
}

}  // namespace forwardpass
