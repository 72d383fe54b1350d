#pragma once
// encoder_layer on a CPU: the layers of a transformer's encoder in one call.
#include <vector>

#include "cpu/layer_linear.h"
#include "params/attention.h"

namespace forwardpass {

// Cosines and sines of all rows of x.
struct LayerRotary {
  const void *cos, *sin;  // [T, rotated], rows by strides in elements; null: nothing is rotated
  int64_t cos_row, sin_row;
};

struct EncoderLayer {
  std::vector<LayerLinear> qkv;  // q, k and v; or one whose rows are those of the three
  LayerLinear out, up, down;
  Affine norm1_weight, norm1_bias, norm2_weight, norm2_bias;  // bias: or null
  bool norms_first;                                           // norm1 comes before qkv: pre-norm
  LayerRotary rotary;
  int64_t window;  // row i attends to the keys from i - window to i + window; kUnlimited: to all
};

// Added to the scores of a sequence's row i and key j: of its head, [i, j].
struct ScoreBias {
  const float* data;  // [heads, size, size], or null: nothing is added
  int64_t size;       // a longer sequence is not known
  int64_t head, row;  // strides; that of keys is 1
};

//   post-norm: y = norm1(x + out(attention(qkv(x)))), x = norm2(y + down(activation(up(y))))
//   pre-norm:  y = x + out(attention(qkv(norm1(x)))), x = y + down(activation(up(norm2(y))))
//
// Values are fp32, and are rounded to `attention` in q, k, v and what attention returns, and to x's dtype between
// layers. The first columns of each head of q and k are rotated, as append_kv has it, and rounded again.
struct EncoderLayerParams {
  Matrix x;   // [T, H] of a float dtype
  void* out;  // as x, contiguous
  Dtype attention;
  const int32_t* cu_seqlens;  // [batch + 1], any numbers
  const int32_t* key_lens;    // [batch]: a sequence's rows attend to its first keys; or null: to all
  int64_t batch, heads;
  ScoreBias score_bias;
  Dtype rotary_dtype;
  int64_t rotated;  // columns; 0: none
  float scale, eps;
  Activation activation;
  bool pre_norm;
  std::vector<EncoderLayer> layers;
};

void encoder_layer_cpu(const EncoderLayerParams& p, const Tensor& x);

}  // namespace forwardpass
