#pragma once
// Rows of a GEMM that go through quantisation, product and epilogue together, a chunk at a time.
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
  e.out = static_cast<char*>(e.out) + first * e.out_stride * size_of(e.out_dtype);
  return e;
}

}  // namespace forwardpass
