#include "torch/decoder_layer.h"

#include "cpu/decoder_layer.h"
#include "torch/encoder_layer.h"
#include "torch/kv_cache.h"

namespace forwardpass {
namespace {

constexpr const char* kOp = "decoder_layer";
// Of a layer, in this order: the tensors of qkv, out, up and down, and the weights of both norms (LAYER in
// ops/decoder_layer/reference.py).
constexpr int64_t kLinears = 4, kOfLayer = kLinears * kOfLayerLinear + 2;

void check_written(const Tensor& x, const char* name) {
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(x.size(d) <= 1 || x.stride(d) != 0, kOp, ": ", name, " is expanded and cannot be written");
}

AttentionTensor rotary(const Tensor& x, const DecoderLayerParams& p, const Tensor& like, const Tensor& cos,
                       const char* name) {
  STD_TORCH_CHECK(x.dim() == 3 && (x.size(0) == 1 || x.size(0) == p.batch) && x.size(1) == p.tokens &&
                      x.size(2) == cos.size(2) && x.size(2) >= 2 && x.size(2) <= p.head_dim && x.size(2) % 2 == 0,
                  kOp, ": ", name, " must be [B or 1, S, R], R even");
  STD_TORCH_CHECK(x.stride(2) == 1 && same_device(x, like), kOp, ": ", name,
                  " must be on x's device, its columns in order");
  STD_TORCH_CHECK(x.scalar_type() == cos.scalar_type() &&
                      (x.scalar_type() == ScalarType::Float || x.scalar_type() == like.scalar_type()),
                  kOp, ": ", name, " must be float32 or of x's dtype");
  return {x.const_data_ptr(), stride_of(x, 0), stride_of(x, 1), 0};
}

DecoderLayer layer_of(const std::vector<OptionalTensor>& weights, int64_t first, const DecoderLayerParams& p,
                      const Tensor& x, bool weight_only) {
  DecoderLayer l{};
  const int64_t h = p.x.columns, q = int64_t{p.heads} * p.head_dim, kv = int64_t{p.kv_heads} * p.head_dim;
  const auto linear = [&](int64_t i, int64_t n, int64_t k) {
    return layer_linear(weights, first + i * kOfLayerLinear, n, k, x, kOp, weight_only);
  };
  l.qkv = linear(0, q + 2 * kv, h), l.out = linear(1, h, q), l.up = linear(2, 0, h);
  const bool gated = is_gated(p.activation);
  STD_TORCH_CHECK(!gated || l.up.weight.rows % 16 == 0, kOp,
                  ": a gated activation needs a multiple of 16 columns, 8 of gate beside 8 of up");
  l.down = linear(3, h, l.up.weight.rows / (gated ? 2 : 1));
  Affine* norms[] = {&l.norm1, &l.norm2};
  for (int64_t i = 0; i < 2; ++i) {
    const OptionalTensor& weight = weights[first + kLinears * kOfLayerLinear + i];
    STD_TORCH_CHECK(weight, kOp, ": a norm has a weight");
    *norms[i] = affine(weight, p.x, x, kOp, "a norm's weight");
  }
  return l;
}

}  // namespace

Tensor decoder_layer(Backend, const Tensor& x, const std::vector<Tensor>& k_caches, const std::vector<Tensor>& v_caches,
                     const Tensor& seq_lens, const std::vector<OptionalTensor>& weights, int64_t heads,
                     const OptionalTensor& cos, const OptionalTensor& sin, double eps,
                     const std::optional<std::string>& activation, std::optional<double> scale,
                     const OptionalTensor& leftpad, bool weight_only) {
  DecoderLayerParams p{};
  p.x = matrix(x, kOp, "x");
  STD_TORCH_CHECK(x.dim() == 3 && is_float(p.x.dtype), kOp, ": x must be float32, float16 or bfloat16 [B, S, H]");
  p.batch = size32(x.size(0), kOp, "sequences"), p.tokens = size32(x.size(1), kOp, "tokens");
  size32(int64_t{p.batch} * p.tokens, kOp, "rows of x");
  const auto layers = static_cast<int64_t>(k_caches.size());
  STD_TORCH_CHECK(layers >= 1 && std::ssize(weights) == layers * kOfLayer && std::ssize(v_caches) == layers, kOp,
                  ": each layer has ", kOfLayer, " weights, a k_cache and a v_cache");
  STD_TORCH_CHECK(k_caches[0].dim() == 4, kOp, ": a k_cache must be [B, L, Hk, D]");
  p.heads = size32(heads, kOp, "heads");
  p.kv_heads = size32(k_caches[0].size(2), kOp, "heads of a cache");
  p.head_dim = size32(k_caches[0].size(3), kOp, "columns of a cache");
  STD_TORCH_CHECK(p.heads >= 1 && p.kv_heads >= 1 && p.heads % p.kv_heads == 0, kOp,
                  ": heads must be a multiple of the cache's");
  p.seq_lens = ints(seq_lens, p.batch, x, kOp, "seq_lens");
  p.leftpad = ints(leftpad, p.batch, x, kOp, "leftpad");
  STD_TORCH_CHECK(cos.has_value() == sin.has_value(), kOp, ": cos and sin go together");
  if (cos) {
    p.cos = rotary(*cos, p, x, *cos, "cos"), p.sin = rotary(*sin, p, x, *cos, "sin");
    p.rotary_dtype = dtype_of(cos->scalar_type(), kOp, "cos"), p.rotated = static_cast<int32_t>(cos->size(2));
  }
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(p.head_dim))));
  STD_TORCH_CHECK(p.scale > 0 && std::isfinite(p.scale), kOp, ": scale must be positive");
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), kOp, ": eps must be finite and at least 0");
  p.eps = static_cast<float>(eps), p.activation = activation_of(activation, kOp);
  // The tokens as the cache's checks have them.
  const Tensor like = empty_strided({p.batch, p.tokens, p.kv_heads, p.head_dim}, {0, 0, 0, 1}, x.scalar_type(), x);
  for (int64_t i = 0; i < layers; ++i) {
    p.layers.push_back(layer_of(weights, i * kOfLayer, p, x, weight_only));
    p.layers[i].cache = kv_cache(like, k_caches[i], v_caches[i], seq_lens, {}, {}, {}, kOp);
    const KvCache& c = p.layers[i].cache;
    STD_TORCH_CHECK(c.heads == p.kv_heads && c.value_dim == p.head_dim, kOp,
                    ": all caches must have the heads and columns of the first");
    check_written(k_caches[i], "k_cache"), check_written(v_caches[i], "v_cache");
  }
  Tensor out = contiguous_rows(sizes_of(x), x.scalar_type(), x);
  p.out = out.mutable_data_ptr();
  if (out.numel()) decoder_layer_cpu(p, x);
  return out;
}

}  // namespace forwardpass
