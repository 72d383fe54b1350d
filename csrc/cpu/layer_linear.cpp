#include "cpu/layer_linear.h"

#include "cpu/vector.h"

namespace forwardpass::cpu {
namespace {

// Of sums of 32 rows, 128 KB.
constexpr int64_t kChunkColumns = 1024;

// But for what is of a quantised input.
Epilogue epilogue_of(const LayerLinear& linear, const Outputs& o) {
  Epilogue e{};
  e.b_scale = linear.scale, e.b_scale_per_column = linear.scale;
  e.bias = linear.bias, e.bias_dtype = linear.bias_dtype, e.activation = o.activation;
  e.out = o.data, e.out_stride = o.stride, e.out_dtype = o.dtype;
  e.residual = o.residual, e.residual_stride = o.stride;
  return e;
}

}  // namespace

void convert(const void* from, Dtype dtype, float* to, int64_t n) {
  with_vectors(VECTOR_CODE { to_floats<V>(from, dtype, n, to); });
}

void convert(const float* from, void* to, Dtype dtype, int64_t n) {
  with_vectors(VECTOR_CODE { from_floats<V>(from, dtype, n, to); });
}

QuantizeParams quantization(const LayerLinear& linear, const Matrix& x, float* scale, int32_t* zero_point) {
  QuantizeParams q{};
  q.x = x;
  q.out.dtype = Dtype::i8, q.out.columns = q.out.group = x.columns, q.out.scale_stride = x.rows;
  q.out.scale = scale, q.out.zero_point = linear.sum ? zero_point : nullptr, q.out.symmetric = !linear.sum;
  q.out.channel_scale = linear.channel_scale;
  return q;
}

Epilogue epilogue_of(const LayerLinear& linear, const QuantizeParams& q, const Outputs& o) {
  Epilogue e = epilogue_of(linear, o);
  e.a_scale = q.out.scale, e.a_scale_per_row = true;
  e.zero_point = q.out.zero_point, e.zero_point_per_row = linear.sum, e.b_sum = linear.sum;
  return e;
}

W8a16Product weight_only_product(const LayerLinear& linear, const Matrix& x, const Outputs& o, Dtype operand,
                                 void* buffer) {
  const Matrix a{buffer, operand, x.rows, x.columns, floats_of(x.columns)};
  convert_rows(x, 0, a);
  return {a, linear.weight, linear.block_scale, epilogue_of(linear, o)};
}

void BlockLayer::pack(const Int8Kernel& kernel, BlockLayer* done) {
  for (size_t i = 0; i < weights_.size(); ++i) {
    Weight& w = weights_[i];
    if (w.linear->weight_only) continue;
    if (done) w.memory = std::move(done->weights_[i].memory);
    const auto& packed = w.linear->packed;
    const auto data = static_cast<const uint8_t*>(packed ? packed->const_data_ptr() : nullptr);
    w.packed = weight_for_blocks(kernel, {w.linear->weight, data, packed ? packed->numel() : 0}, w.memory);
  }
}

BlockProducts::BlockProducts(const Int8Kernel& kernel, int64_t depth, Dtype operand)
    : kernel_(kernel), operand_(operand) {
  depth = round_up(depth, kTileBytes);
  rows_ = allocate(kBlockRows * (operand == Dtype::i8 ? stride_of_block(depth) : size_of(operand) * depth));
  if (operand != Dtype::i8) return;
  scratch_ = allocate(kernel.scratch_bytes_per_column * depth), sums_ = allocate(kBlockRows * kChunkColumns * 4);
}

void BlockProducts::linear(const BlockLayer& layer, const LayerLinear& linear, const Matrix& x, const Outputs& o,
                           bool is_quantized) {
  if (linear.weight_only)
    return weight_only_product(linear, x, o, operand_, at<uint8_t>(rows_)).few_rows(0, linear.weight.rows);
  const PackedWeight& b = layer[linear];
  const auto rows = at<uint8_t>(rows_), scratch = at<uint8_t>(scratch_);
  const int64_t stride = stride_of_block(b.depth);
  QuantizeParams q = quantization(linear, x, scales_, zero_points_);
  q.out.q = rows, q.out.q_stride = stride;
  if (!is_quantized) {
    quantize_cpu(q);
    kernel_.prepare_block(b, rows, stride, scratch);
  }
  multiply_block(kernel_, {rows, stride, x.rows, scratch, at<int32_t>(sums_), kChunkColumns}, linear.weight.rows, b, 0,
                 b.columns, epilogue_of(linear, q, o));
}

}  // namespace forwardpass::cpu
