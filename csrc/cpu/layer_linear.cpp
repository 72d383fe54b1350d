#include "cpu/layer_linear.h"

#include "cpu/quantize_rows.h"
#include "cpu/vector.h"
#include "torch/int8_operands.h"

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

FewRowsProducts::FewRowsProducts(const Int8Kernel* kernel, int64_t rows, int64_t depth, const Tensor& x)
    : kernel_(kernel), tensor_(x), scales_(allocate(rows * 4)), zero_points_(allocate(rows * 4)) {
  if (!kernel) return;
  const int64_t bytes = rows * round_up(depth, kTileBytes);
  quantized_ = allocate(bytes), prepared_ = allocate(bytes * kernel->few_bytes), corrections_ = allocate(rows * 4);
}

QuantizeParams FewRowsProducts::quantization(const LayerLinear& linear, const Matrix& x) const {
  QuantizeParams q = cpu::quantization(linear, x, at<float>(scales_), at<int32_t>(zero_points_));
  if (kernel_) q.out.q = at<uint8_t>(quantized_), q.out.q_stride = round_up(x.columns, kTileBytes);
  return q;
}

void FewRowsProducts::quantize(const LayerLinear& linear, const Matrix& x, Range rows) const {
  if (!kernel_ || rows.first == rows.last) return;
  const QuantizeParams q = quantization(linear, x);
  quantize_rows(q, rows.first, rows.last);
  const int64_t depth = q.out.q_stride, count = rows.last - rows.first;
  uint8_t* quantized = at<uint8_t>(quantized_) + rows.first * depth;
  for (int64_t r = 0; r < count; ++r) std::fill_n(quantized + r * depth + x.columns, depth - x.columns, 0);
  kernel_->prepare_few(quantized, count, depth, at<uint8_t>(prepared_) + rows.first * depth * kernel_->few_bytes,
                       at<uint32_t>(corrections_) + rows.first);
}

void FewRowsProducts::multiply(const LayerLinear& linear, const Matrix& x, const Outputs& o, Range columns) const {
  const QuantizeParams q = quantization(linear, x);
  const Epilogue e = epilogue_of(linear, q, o);
  if (!kernel_)
    return int8_gemm_cpu(tensor_, {nullptr, Dtype::i8, x.rows, x.columns, 0}, linear.weight, e, &q, linear.packed);
  const FewRows few{at<uint8_t>(prepared_), x.rows, q.out.q_stride * kernel_->few_bytes, at<uint32_t>(corrections_)};
  multiply_columns<Dtype::i32>(x.rows, columns.first, columns.last, e,
                               [&](int64_t first, int64_t last, int32_t* sums, int64_t stride) {
                                 kernel_->multiply_few(few, linear.weight, first, last, sums, stride);
                               });
}

}  // namespace forwardpass::cpu
