#pragma once
// decoder_layer on a CPU: the layers of a transformer's decoder in one call, for new tokens of sequences with a cache.
#include <vector>

#include "cpu/layer_linear.h"
#include "params/attention.h"

namespace forwardpass {

struct DecoderLayer {
  LayerLinear qkv, out, up, down;
  Affine norm1, norm2;  // weights
  KvCache cache;        // of the attention's dtype, contiguous
};

//   q, k, v = qkv(norm1(x)), q and k rotated; k and v go to the cache
//   y = x + out(attention(q, cache)), x = y + down(activation(up(norm2(y))))
//
// Linear layers are all of one kind, weight_only or not. Norms are RMS norms. Values are fp32, and are rounded to x's
// dtype in q, k, v, what attention returns, and between layers; and to bfloat16 where W8a16Product::operand says so.
// Token i of a sequence is at position seq_len - tokens + i of its cache, as append_kv has it; it attends to the keys
// from leftpad to itself, as attention_decode has it.
struct DecoderLayerParams {
  Matrix x;   // [batch * tokens, H] of a float dtype
  void* out;  // as x, contiguous
  int32_t batch, tokens, heads, kv_heads, head_dim;
  AttentionTensor cos, sin;  // [batch, token, 0, rotated]; null: no rotation
  Dtype rotary_dtype;
  int32_t rotated;
  const int32_t *seq_lens, *leftpad;  // [batch]; leftpad: or null
  float scale, eps;
  Activation activation;
  std::vector<DecoderLayer> layers;

  bool weight_only() const { return layers[0].qkv.weight_only; }
};

void decoder_layer_cpu(const DecoderLayerParams& p, const Tensor& x);

}  // namespace forwardpass
