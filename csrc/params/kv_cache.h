#pragma once
#include "params/common.h"

namespace forwardpass {

// Keys or values of a cache: [first, row, head, dim] by strides in elements, the last dimension with stride 1. `first`
// is the sequence or, with a block table, the page.
struct CacheTensor {
  void* data;
  int64_t first, row, head;
};

// The scales of 8-bit elements by the same indices, strides 0 in dimensions that share one.
struct CacheScale {
  float* data;  // or null
  int64_t first, row, head;
  bool per_token;
};

// A cache of the keys and values of sequences. k and v may overlap. Lengths and pages are on the device, where no host
// checks them: a kernel reads and writes nothing outside of the cache, and rows that would need it are NaN.
struct KvCache {
  CacheTensor k, v;
  CacheScale k_scale, v_scale;
  Dtype dtype;                 // of k and v: f32, f16, bf16, i8, e4m3
  const int32_t* seq_lens;     // [batch], on the device
  const int32_t* block_table;  // [batch, blocks], rows table_stride apart: pages of `page` rows; or null
  int64_t table_stride;
  int32_t batch, heads, head_dim, value_dim;
  int32_t pages, page, blocks;  // contiguous: batch, L and 1

  HOST_DEVICE int64_t capacity() const { return int64_t{page} * blocks; }
  // Whether a sequence has a length, and the cache has room for it.
  HOST_DEVICE bool has_room(int64_t sequence) const {
    return seq_lens[sequence] >= 0 && seq_lens[sequence] <= capacity();
  }
  // The first index of a token within the capacity: its sequence or its page. -1: the table names no page there.
  HOST_DEVICE int32_t first_of(int32_t sequence, int32_t token) const {
    return block_table ? named(*entry(sequence, token)) : sequence;
  }
  // The table's entry of a token; and the page that it names, or -1.
  HOST_DEVICE const int32_t* entry(int32_t sequence, int32_t token) const {
    return block_table + sequence * table_stride + token / page;
  }
  HOST_DEVICE int32_t named(int32_t entry) const { return entry >= 0 && entry < pages ? entry : -1; }
};

}  // namespace forwardpass
