#pragma once
// Torch side of QuantizedRows: allocates what a quantising op returns and fills in the struct.
#include "torch/ops.h"

namespace forwardpass {

struct QuantizeOptions {
  ScalarType dtype;
  OptionalTensorRef scale = {};  // static; without one it is computed
  OptionalTensorRef zero_point = {};
  std::optional<int64_t> group_size = {};
  bool symmetric = true;
  OptionalTensorRef channel_scale = {};
  std::optional<int64_t> rotate = {};
};

// Checks the options; allocates no results.
inline QuantizedRows quantized_options(int64_t columns, const QuantizeOptions& o, const Tensor& x, const char* op) {
  QuantizedRows r{};
  r.dtype = dtype_of(o.dtype, op, "q");
  r.columns = columns;
  r.group = o.group_size.value_or(r.columns);
  r.symmetric = o.symmetric;
  STD_TORCH_CHECK(r.dtype == Dtype::i8 || (r.dtype == Dtype::e4m3 && o.symmetric), op,
                  ": dtype must be int8, or float8_e4m3fn (symmetric)");
  STD_TORCH_CHECK(r.group >= 1, op, ": group_size must be at least 1");
  STD_TORCH_CHECK(!o.scale || !o.group_size, op, ": a static scale has no groups");
  STD_TORCH_CHECK(o.zero_point.has_value() == (o.scale.has_value() && !o.symmetric), op,
                  ": zero_point goes with a static asymmetric scale");
  r.channel_scale = floats(o.channel_scale, r.columns, x, op, "channel_scale");
  r.static_scale = floats(o.scale, 1, x, op, "scale");
  r.static_zero_point = ints(o.zero_point, 1, x, op, "zero_point");
  r.rotation = o.rotate.value_or(0);
  STD_TORCH_CHECK(!o.rotate || r.rotation == 64 || r.rotation == 128 || r.rotation == 256, op,
                  ": rotate must be 64, 128 or 256");
  STD_TORCH_CHECK(!o.rotate || (r.columns % r.rotation == 0 && r.group % r.rotation == 0), op,
                  ": rotate must divide the columns and group_size");
  return r;
}

// sizes: [lead..., columns] of q.
inline std::pair<Quantized, QuantizedRows> quantized_rows(const std::vector<int64_t>& sizes, const QuantizeOptions& o,
                                                          const Tensor& x, const char* op) {
  QuantizedRows r = quantized_options(sizes.back(), o, x, op);
  Tensor q = padded_rows(sizes, o.dtype, 1, x);
  r.q = q.mutable_data_ptr();
  r.q_stride = round_up(r.columns, 16);

  // scale [lead...] or, grouped, [lead..., groups] with the rows contiguous and groups a multiple of 4 floats apart
  std::vector<int64_t> shape(sizes.begin(), sizes.end() - 1), strides(shape.size());
  int64_t rows = 1;
  for (int64_t d = static_cast<int64_t>(shape.size()) - 1; d >= 0; --d) {
    strides[d] = rows;
    rows *= std::max<int64_t>(shape[d], 1);
  }
  r.scale_stride = rows;
  if (o.group_size) {
    r.scale_stride = round_up(rows, 4);
    shape.push_back((r.columns + r.group - 1) / r.group);
    strides.push_back(r.scale_stride);
  }
  const std::vector<int64_t> none{0}, one{1};
  const bool dynamic = !o.scale, has_zero_point = dynamic && !o.symmetric;
  Tensor scale = empty_strided(dynamic ? shape : none, dynamic ? strides : one, ScalarType::Float, x);
  Tensor zero_point = empty_strided(has_zero_point ? shape : none, has_zero_point ? strides : one, ScalarType::Int, x);
  r.scale = dynamic ? static_cast<float*>(scale.mutable_data_ptr()) : nullptr;
  r.zero_point = has_zero_point ? static_cast<int32_t*>(zero_point.mutable_data_ptr()) : nullptr;
  return {Quantized{q, scale, zero_point}, r};
}

// The GEMM's a is what q are: its epilogue multiplies by their scale and subtracts their zero point.
inline void undo_quantization(Epilogue& e, const QuantizedRows& q) {
  e.a_scale = q.static_scale ? q.static_scale : q.scale;
  e.a_scale_per_row = !q.static_scale;
  if (q.symmetric) return;
  e.zero_point = q.static_scale ? q.static_zero_point : q.zero_point;
  e.zero_point_per_row = !q.static_scale;
}

// The operation `quantize`, for those of which it is a part.
Quantized run_quantize(Backend backend, const Tensor& x, const QuantizeOptions& o, const char* op);

}  // namespace forwardpass
