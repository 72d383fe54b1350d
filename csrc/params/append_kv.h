#pragma once
#include "params/affine.h"
#include "params/attention.h"
#include "params/device.h"
#include "params/kv_cache.h"

namespace forwardpass {

// append_kv: token i of a sequence goes to position seq_len - tokens + i, if that is at least 0. If the cache has no
// room for the sequence's length, or the table no page for the position, nothing is written and q_out's row is NaN.
// Rows of k, and of q, which goes to q_out, are normed, where there is a weight for it, and their first `rotated`
// columns rotated:
//
//   k[c] = k[c] / sqrt(sum(k^2) / head_dim + eps) weight[c]
//   k[c] = k[c] cos[c] + (c < rotated / 2 ? -k[c + rotated / 2] : k[c - rotated / 2]) sin[c]
//   interleaved: k[c] = k[c] cos[c] + (c % 2 == 0 ? -k[c + 1] : k[c - 1]) sin[c]
//
// each operation rounded once to fp32. The sum is made of kNormSums, each of every kNormSums-th column in their order;
// then the second half of the sums is added to the first, until one is left. A sum that overflows makes NaN. Scales per
// token are written, others divide.
constexpr int kNormSums = 32;
struct AppendKvParams {
  static constexpr const char* kLauncher = "forwardpass_append_kv";
  AttentionTensor k, v;      // [batch, token, head, head_dim or value_dim]
  AttentionTensor q;         // [batch, token, q_heads, dim]; null: none
  void* q_out;               // as q, contiguous
  Affine q_norm, k_norm;     // weights
  AttentionTensor cos, sin;  // [batch, token, 0, rotated], by strides; or null
  Dtype dtype, rotary_dtype;
  float eps;
  int32_t q_heads, tokens, rotated;
  bool interleaved;
  KvCache cache;
  Device device;  // that runs it; unused on a CPU

  // The column that one of the first `rotated` is rotated with: beyond it, if it is the pair's first.
  HOST_DEVICE int32_t partner(int32_t column) const {
    const bool is_first = interleaved ? column % 2 == 0 : column < rotated / 2;
    const int32_t apart = interleaved ? 1 : rotated / 2;
    return is_first ? column + apart : column - apart;
  }
  // The first two indices of a token's row; first -1: it is not written, as it is before its sequence, or is lost.
  struct Place {
    int64_t first, row;
    bool is_lost;
  };
  HOST_DEVICE Place place(int32_t sequence, int32_t token) const {
    if (!cache.has_room(sequence)) return {-1, 0, true};
    const int32_t position = cache.seq_lens[sequence] - tokens + token;
    if (position < 0) return {-1, 0, false};
    const int32_t first = cache.first_of(sequence, position);
    return {first, cache.block_table ? position % cache.page : position, first < 0};
  }
};

void append_kv_cpu(const AppendKvParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_append_kv(const forwardpass::AppendKvParams* p, void* stream);
