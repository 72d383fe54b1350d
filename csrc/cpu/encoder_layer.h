#pragma once
// encoder_layer on a CPU: the layers of a transformer's encoder in one call.
#include <vector>

#include "cpu/layer_linear.h"

namespace forwardpass {

struct EncoderLayer {
  LayerLinear qkv[3], out, up, down;
  Affine norm1_weight, norm1_bias, norm2_weight, norm2_bias;  // fp32; bias: or null
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
// layers.
struct EncoderLayerParams {
  Matrix x;   // [T, H] of a float dtype
  void* out;  // as x, contiguous
  Dtype attention;
  const int32_t* cu_seqlens;  // [batch + 1], any numbers
  const int32_t* key_lens;    // [batch]: a sequence's rows attend to its first keys; or null: to all
  int64_t batch, heads;
  ScoreBias score_bias;
  float scale, eps;
  Activation activation;
  bool pre_norm;
  std::vector<EncoderLayer> layers;
};

void encoder_layer_cpu(const EncoderLayerParams& p, const Tensor& x);

}  // namespace forwardpass
