#pragma once
// Torch side of Epilogue: checks the options, allocates the output, fills in the struct.
#include "torch/ops.h"

namespace forwardpass {

struct EpilogueOptions {
  OptionalTensorRef a_scale = {};  // without a scale: 1, or the caller fills it in
  OptionalTensorRef b_scale = {};
  OptionalTensorRef bias = {};
  Activation activation = Activation::none;
  ScalarType out_dtype;
  OptionalTensorRef out_scale = {};
  OptionalTensorRef a_zero_point = {};
  OptionalTensorRef b_sum = {};
  OptionalTensorRef residual = {};
  bool residual_first = false;
  OptionalTensorRef ada_gate = {};
};

// One element for all rows, or one for each of n, in the shape of the rows or flat.
template <class T>
const T* one_or_each_row(OptionalTensorRef v, int64_t n, ScalarType type, const Tensor& x, bool& is_vector,
                         const char* op, const char* name) {
  is_vector = v && v->numel() != 1;
  return elements<T>(v, is_vector ? n : 1, type, x, op, name);
}
// The same of columns, in one dimension.
inline const float* one_or_each_column(OptionalTensorRef v, int64_t n, const Tensor& x, bool& is_vector, const char* op,
                                       const char* name) {
  is_vector = v && v->numel() != 1;
  return floats(v, is_vector ? n : 1, x, op, name);
}

// ada_gate, a gate for each sample, of an output of `sizes` [samples, ..., columns].
inline void gate_samples(Epilogue& e, const std::vector<int64_t>& sizes, int64_t rows, const EpilogueOptions& o,
                         const Tensor& x, const char* op) {
  STD_TORCH_CHECK(o.residual.has_value(), op, ": ada_gate goes with a residual");
  STD_TORCH_CHECK(is_float(e.out_dtype) && o.ada_gate->scalar_type() == o.out_dtype && same_device(*o.ada_gate, x), op,
                  ": ada_gate must have the output's float dtype and its device");
  STD_TORCH_CHECK(rows <= UINT32_MAX, op, ": ada_gate goes with fewer than 2^32 rows");
  STD_TORCH_CHECK(sizes.size() >= 2, op, ": ada_gate needs an output [B, ..., N]");
  check_sizes(*o.ada_gate, {sizes.front(), sizes.back()}, op, "ada_gate");
  if (rows == 0 || sizes.back() == 0) return;
  const Matrix gate = matrix(*o.ada_gate, op, "ada_gate");
  e.ada_gate = gate.data, e.ada_gate_stride = gate.stride, e.rows_per_sample = rows / sizes.front();
}

// Checks the options; allocates no output. sizes: [lead..., columns] of the accumulators on entry, of the output on
// return; rows: the product of lead.
inline Epilogue epilogue_options(std::vector<int64_t>& sizes, int64_t rows, const EpilogueOptions& o, const Tensor& x,
                                 const char* op) {
  Epilogue e{};
  const int64_t columns = sizes.back();
  e.activation = o.activation;
  e.a_scale = one_or_each_row<float>(o.a_scale, rows, ScalarType::Float, x, e.a_scale_per_row, op, "a_scale");
  e.b_scale = one_or_each_column(o.b_scale, columns, x, e.b_scale_per_column, op, "b_scale");
  STD_TORCH_CHECK(o.a_zero_point.has_value() == o.b_sum.has_value(), op, ": a_zero_point and b_sum go together");
  e.zero_point =
      one_or_each_row<int32_t>(o.a_zero_point, rows, ScalarType::Int, x, e.zero_point_per_row, op, "a_zero_point");
  e.b_sum = ints(o.b_sum, columns, x, op, "b_sum");
  if (o.bias) {
    e.bias_dtype = dtype_of(o.bias->scalar_type(), op, "bias");
    STD_TORCH_CHECK(is_float(e.bias_dtype), op, ": bias must be float32, float16 or bfloat16");
    e.bias = vector<void>(o.bias, columns, o.bias->scalar_type(), x, op, "bias");
  }
  if (is_gated(e.activation)) {
    STD_TORCH_CHECK(columns % 16 == 0, op,
                    ": a gated activation needs a multiple of 16 columns, 8 of gate beside 8 of up");
    sizes.back() = columns / 2;
  }
  e.out_dtype = dtype_of(o.out_dtype, op, "out");
  STD_TORCH_CHECK(o.out_scale.has_value() == !is_float(e.out_dtype) && e.out_dtype != Dtype::i32, op,
                  ": out_dtype must be a float type, or int8 or float8_e4m3fn with an out_scale");
  e.out_scale = one_or_each_column(o.out_scale, sizes.back(), x, e.out_scale_per_column, op, "out_scale");
  if (o.residual) {
    STD_TORCH_CHECK(is_float(e.out_dtype) && o.residual->scalar_type() == o.out_dtype &&
                        sizes_of(*o.residual) == sizes && same_device(*o.residual, x),
                    op, ": residual must be as the output: of its shape, its float dtype and its device");
    if (o.residual->numel()) {
      const Matrix residual = matrix(*o.residual, op, "residual");
      e.residual = residual.data, e.residual_stride = residual.stride, e.residual_first = o.residual_first;
    }
  }
  if (o.ada_gate) gate_samples(e, sizes, rows, o, x, op);
  return e;
}

inline Tensor epilogue_output(Epilogue& e, const std::vector<int64_t>& sizes, ScalarType out_dtype, const Tensor& x) {
  // quantised rows are operands of another GEMM and padded accordingly; others are contiguous
  Tensor out = is_float(e.out_dtype) ? contiguous_rows(sizes, out_dtype, x) : padded_rows(sizes, out_dtype, 1, x);
  e.out = out.mutable_data_ptr();
  e.out_stride = is_float(e.out_dtype) ? sizes.back() : round_up(sizes.back(), 16);
  return out;
}

inline std::pair<Tensor, Epilogue> epilogue(std::vector<int64_t> sizes, int64_t rows, const EpilogueOptions& o,
                                            const Tensor& x, const char* op) {
  Epilogue e = epilogue_options(sizes, rows, o, x, op);
  Tensor out = epilogue_output(e, sizes, o.out_dtype, x);
  return {out, e};
}

}  // namespace forwardpass
