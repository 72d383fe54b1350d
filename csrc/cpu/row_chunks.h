#pragma once
// Parts of a GEMM that go through quantisation, product and epilogue together.
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass {

inline QuantizeParams rows_from(QuantizeParams p, int64_t first, int64_t count) {
  p.x.data = static_cast<const char*>(p.x.data) + first * p.x.stride * size_of(p.x.dtype);
  p.x.rows = count;
  p.out.q = static_cast<char*>(p.out.q) + first * p.out.q_stride;
  if (p.out.scale) p.out.scale += first;
  if (p.out.zero_point) p.out.zero_point += first;
  return p;
}

inline Epilogue rows_from(Epilogue e, int64_t first) {
  if (e.a_scale_per_row) e.a_scale += first;
  if (e.zero_point_per_row) e.zero_point += first;
  if (e.group_scale) e.group_scale += first;
  if (e.residual) e.residual = static_cast<const char*>(e.residual) + first * e.residual_stride * size_of(e.out_dtype);
  e.rows_before += first;
  e.out = static_cast<char*>(e.out) + first * e.out_stride * size_of(e.out_dtype);
  return e;
}

// From a column of the product on, a multiple of 16.
inline Epilogue columns_from(Epilogue e, int64_t first) {
  const int64_t first_output = is_gated(e.activation) ? first / 2 : first;
  if (e.b_scale_per_column) e.b_scale += first;
  if (e.bias) e.bias = static_cast<const char*>(e.bias) + first * size_of(e.bias_dtype);
  if (e.b_sum) e.b_sum += first;
  if (e.out_scale_per_column) e.out_scale += first_output;
  if (e.residual) e.residual = static_cast<const char*>(e.residual) + first_output * size_of(e.out_dtype);
  if (e.ada_gate) e.ada_gate = static_cast<const char*>(e.ada_gate) + first_output * size_of(e.out_dtype);
  e.out = static_cast<char*>(e.out) + first_output * size_of(e.out_dtype);
  return e;
}

}  // namespace forwardpass
