#include "torch/encoder_layer.h"

#include <algorithm>
#include <tuple>

#include "cpu/encoder_layer.h"
#include "torch/int8_operands.h"

namespace forwardpass {
namespace {

constexpr const char* kOp = "encoder_layer";
// Of a layer, in this order: of q, k, v, out, up and down weight, scale, bias, sum, channel_scale and packed each; of
// both norms weight and bias (LAYER in ops/encoder_layer/__init__.py).
constexpr int64_t kLinears = 6, kOfLinear = kOfLayerLinear, kOfLayer = kLinears * kOfLinear + 4;

using Weights = std::vector<std::optional<Tensor>>;

EncoderLayer layer_of(const Weights& weights, int64_t first, const EncoderLayerParams& p, const Tensor& x) {
  const int64_t h = p.x.columns;
  EncoderLayer l{};
  // One weight of q, k and v in q's place, none in theirs.
  const bool fused =
      std::all_of(&weights[first + kOfLinear], &weights[first + 3 * kOfLinear], [](const auto& t) { return !t; });
  for (int64_t i = 0; i < (fused ? 1 : 3); ++i)
    l.qkv.push_back(layer_linear(weights, first + i * kOfLinear, fused ? 3 * h : h, h, x, kOp));
  l.out = layer_linear(weights, first + 3 * kOfLinear, h, h, x, kOp);
  l.up = layer_linear(weights, first + 4 * kOfLinear, 0, h, x, kOp);
  const bool gated = is_gated(p.activation);
  STD_TORCH_CHECK(!gated || l.up.weight.rows % 16 == 0, kOp,
                  ": a gated activation needs a multiple of 16 columns, 8 of gate beside 8 of up");
  l.down = layer_linear(weights, first + 5 * kOfLinear, h, l.up.weight.rows / (gated ? 2 : 1), x, kOp);
  Affine* norms[] = {&l.norm1_weight, &l.norm1_bias, &l.norm2_weight, &l.norm2_bias};
  for (int64_t i = 0; i < 4; ++i)
    *norms[i] = affine(weights[first + kLinears * kOfLinear + i], p.x, x, kOp, "a norm's weight or bias");
  return l;
}

ScoreBias score_bias_of(const OptionalTensor& t, int64_t heads, const Tensor& x) {
  if (!t) return {};
  const int64_t n = t->dim();
  STD_TORCH_CHECK(t->scalar_type() == ScalarType::Float && same_device(*t, x) &&
                      (n == 3 || (n == 4 && t->size(0) == 1)) && t->size(n - 3) == heads &&
                      t->size(n - 2) == t->size(n - 1) && (t->size(n - 1) <= 1 || t->stride(n - 1) == 1),
                  kOp, ": score_bias must be float32 [", heads, ", S, S], on x's device, with a last stride of 1");
  return {static_cast<const float*>(t->const_data_ptr()), t->size(n - 1), t->stride(n - 3), t->stride(n - 2)};
}

// Rows [T, rotated] of a layer's cosines or sines, and their stride.
std::pair<const void*, int64_t> rotary_of(const Tensor& t, const Tensor& like, const EncoderLayerParams& p,
                                          const Tensor& x) {
  STD_TORCH_CHECK(t.dim() == 2 && t.size(0) == p.x.rows && t.size(1) == like.size(1) && t.stride(1) == 1 &&
                      t.scalar_type() == like.scalar_type() && same_device(t, x),
                  kOp, ": cos and sin must be [T, R] of one dtype, on x's device, with a last stride of 1");
  return {t.const_data_ptr(), t.stride(0)};
}

void set_rotary(EncoderLayerParams& p, const std::vector<Tensor>& cos, const std::vector<Tensor>& sin,
                const Tensor& x) {
  STD_TORCH_CHECK(cos.size() == sin.size() && (cos.empty() || cos.size() == p.layers.size()), kOp,
                  ": cos and sin are one a layer, or none");
  if (cos.empty()) return;
  p.rotary_dtype = dtype_of(cos[0].scalar_type(), kOp, "cos");
  STD_TORCH_CHECK((p.rotary_dtype == Dtype::f32 || p.rotary_dtype == p.x.dtype) && cos[0].dim() == 2, kOp,
                  ": cos must be float32 or of x's dtype, [T, R]");
  p.rotated = cos[0].size(1);
  STD_TORCH_CHECK(p.rotated >= 2 && p.rotated % 2 == 0 && p.rotated <= p.x.columns / p.heads, kOp,
                  ": cos must have an even number of columns, at most those of a head");
  for (size_t i = 0; i < p.layers.size(); ++i) {
    LayerRotary& r = p.layers[i].rotary;
    std::tie(r.cos, r.cos_row) = rotary_of(cos[i], cos[0], p, x);
    std::tie(r.sin, r.sin_row) = rotary_of(sin[i], cos[0], p, x);
  }
}

// -1: unlimited.
void set_windows(EncoderLayerParams& p, const std::vector<int64_t>& windows) {
  STD_TORCH_CHECK(windows.empty() || windows.size() == p.layers.size(), kOp, ": windows are one a layer, or none");
  for (size_t i = 0; i < p.layers.size(); ++i) {
    const int64_t window = windows.empty() ? -1 : windows[i];
    STD_TORCH_CHECK(window >= -1, kOp, ": a window must be at least 0, or -1");
    p.layers[i].window = window < 0 ? kUnlimited : std::min<int64_t>(window, kUnlimited);
  }
}

}  // namespace

LayerLinear layer_linear(const std::vector<OptionalTensor>& weights, int64_t i, int64_t n, int64_t k, const Tensor& x,
                         const char* op, bool weight_only) {
  LayerLinear l{};
  STD_TORCH_CHECK(weights[i] && weights[i + 1], op, ": a layer has weights and their scales");
  const Dtype dtype = weight_only ? dtype_of(weights[i]->scalar_type(), op, "a weight") : Dtype::i8;
  STD_TORCH_CHECK(dtype == Dtype::i8 || dtype == Dtype::e4m3, op, ": a weight must be int8 or float8_e4m3fn");
  l.weight = b_operand(*weights[i], dtype, k, x, op, "a weight"), l.weight_only = weight_only;
  if (n == 0) n = l.weight.rows;
  STD_TORCH_CHECK(l.weight.rows == n, op, ": a weight must be [", n, ", ", k, "]");
  if (weight_only && weights[i + 1]->dim() == 2) {
    const int64_t blocks = ceil_div(k, kScaleBlock);
    check_sizes(*weights[i + 1], {n, blocks}, op, "a weight's scale");
    l.block_scale = elements<float>(*weights[i + 1], n * blocks, ScalarType::Float, x, op, "a weight's scale");
  } else {
    l.scale = floats(weights[i + 1], n, x, op, "a weight's scale");
  }
  if (const OptionalTensor& bias = weights[i + 2]) {
    l.bias_dtype = dtype_of(bias->scalar_type(), op, "a bias");
    STD_TORCH_CHECK(is_float(l.bias_dtype), op, ": a bias must be float32, float16 or bfloat16");
    l.bias = vector<void>(bias, n, bias->scalar_type(), x, op, "a bias");
  }
  if (weight_only) {
    for (int64_t j = i + 3; j < i + kOfLayerLinear; ++j)
      STD_TORCH_CHECK(!weights[j], op, ": a weight whose input stays as it is has a scale and a bias alone");
    return l;
  }
  l.sum = ints(weights[i + 3], n, x, op, "a weight's sum");
  check_int8_depth(k, l.sum, op);
  l.channel_scale = floats(weights[i + 4], k, x, op, "a weight's channel_scale");
  check_packed(weights[i + 5], x, op);
  l.packed = weights[i + 5];
  return l;
}

Tensor encoder_layer(Backend, const Tensor& x, const Tensor& cu_seqlens, const Weights& weights, int64_t heads,
                     double eps, const std::optional<std::string>& activation, bool pre_norm,
                     std::optional<double> scale, ScalarType attention_dtype, const OptionalTensor& key_lens,
                     const OptionalTensor& score_bias, const std::vector<Tensor>& cos, const std::vector<Tensor>& sin,
                     const std::vector<int64_t>& windows, bool first_norm) {
  EncoderLayerParams p{};
  p.x = matrix(x, kOp, "x");
  const int64_t h = p.x.columns;
  STD_TORCH_CHECK(x.dim() == 2 && is_float(p.x.dtype), kOp, ": x must be float32, float16 or bfloat16 [T, H]");
  size32(p.x.rows, kOp, "rows of x");
  STD_TORCH_CHECK(heads >= 1 && h % heads == 0, kOp, ": heads must divide the columns of x");
  p.attention = dtype_of(attention_dtype, kOp, "attention_dtype");
  STD_TORCH_CHECK(is_float(p.attention), kOp, ": attention_dtype must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.numel() >= 1, kOp, ": cu_seqlens must be int32 [B + 1]");
  p.batch = cu_seqlens.numel() - 1, p.heads = heads;
  p.cu_seqlens = ints(cu_seqlens, p.batch + 1, x, kOp, "cu_seqlens");
  p.key_lens = ints(key_lens, p.batch, x, kOp, "key_lens");
  p.score_bias = score_bias_of(score_bias, heads, x);
  p.scale = static_cast<float>(scale.value_or(1 / std::sqrt(static_cast<double>(h / heads))));
  STD_TORCH_CHECK(p.scale > 0 && std::isfinite(p.scale), kOp, ": scale must be positive");
  STD_TORCH_CHECK(eps >= 0 && std::isfinite(eps), kOp, ": eps must be finite and at least 0");
  p.eps = static_cast<float>(eps), p.pre_norm = pre_norm, p.activation = activation_of(activation, kOp);
  STD_TORCH_CHECK(!weights.empty() && weights.size() % kOfLayer == 0, kOp, ": weights must be ", kOfLayer,
                  " tensors a layer");
  for (int64_t i = 0; i < std::ssize(weights); i += kOfLayer) p.layers.push_back(layer_of(weights, i, p, x));
  STD_TORCH_CHECK(first_norm || pre_norm, kOp, ": first_norm=False is for pre_norm=True");
  const bool fused = p.layers[0].qkv.size() == 1;
  for (EncoderLayer& layer : p.layers) {
    STD_TORCH_CHECK((layer.qkv.size() == 1) == fused, kOp, ": q, k and v are one weight in all layers, or in none");
    layer.norms_first = pre_norm && (first_norm || &layer != &p.layers[0]);
  }
  set_rotary(p, cos, sin, x);
  set_windows(p, windows);
  Tensor out = contiguous_rows({p.x.rows, h}, x.scalar_type(), x);
  p.out = out.mutable_data_ptr();
  encoder_layer_cpu(p, x);
  return out;
}

}  // namespace forwardpass
