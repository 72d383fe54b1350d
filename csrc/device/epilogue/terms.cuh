#pragma once
// The terms of the epilogue, each written once: the formula of Epilogue (params/common.h), operation by operation, for
// values that lie in registers in any layout. A layout says which row and which column a value is of:
//
//   struct Layout {
//     float row_scale(int i) const;     // a_scale of value i's row
//     ColumnTerms column(int i) const;  // what its column has
//   };
//
// vector8.cuh has eight columns of a row, fragment.cuh a tensor core's accumulators, fragment_transposed.cuh those
// whose rows are the output's columns.
#include "device/activation.cuh"
#include "device/upconvert.cuh"
#include "device/vec.cuh"

namespace forwardpass {

struct ColumnTerms {
  float scale, bias;
};

// acc - zero_point * b_sum, of integers.
template <int N>
__device__ inline void subtract_zero_point(int32_t (&acc)[N], int32_t zero_point, const int32_t (&b_sum)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) acc[i] -= zero_point * b_sum[i];
}

// y = fma(float(acc), a_scale * b_scale, bias); Acc is int32_t or a float.
template <int N, class Acc, class Layout>
__device__ inline void dequantize(float (&y)[N], const Acc (&acc)[N], const Layout& layout) {
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const ColumnTerms column = layout.column(i);
    y[i] = __fmaf_rn(to_float(acc[i]), __fmul_rn(layout.row_scale(i), column.scale), column.bias);
  }
}

// activation(gate) * up: of gates that are activated already.
template <int N>
__device__ inline void multiply_by_up(float (&gate)[N], const float (&up)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) gate[i] = __fmul_rn(gate[i], up[i]);
}

// Outputs times their sample's gate, which has their type.
template <int N, class T>
__device__ inline void multiply_by_ada_gate(float (&y)[N], const T (&gate)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = __fmul_rn(y[i], to_float(gate[i]));
}
// The sample of a row. A product has fewer than 2^31 rows, and a division of 64 bits is a call.
__device__ inline int64_t sample_of(const Epilogue& e, int64_t row) {
  return static_cast<uint32_t>(row) / static_cast<uint32_t>(e.rows_per_sample);
}

// Outputs plus a residual of their type.
template <int N, class T>
__device__ inline void add_residual(float (&y)[N], const T (&residual)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) y[i] = __fadd_rn(y[i], to_float(residual[i]));
}

// Two outputs of 16 bits, each rounded once; the first one in the low half.
template <Dtype Out>
__device__ inline uint32_t pair_of_16_bits(float low, float high) {
  static_assert(Out == Dtype::f16 || Out == Dtype::bf16);
  if constexpr (Out == Dtype::bf16) {
    const auto pair = __float22bfloat162_rn(make_float2(low, high));
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const auto pair = __float22half2_rn(make_float2(low, high));
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <Dtype Out, int N>
__device__ inline void round_pairs(uint32_t (&pair)[N], const float (&y)[2 * N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) pair[i] = pair_of_16_bits<Out>(y[2 * i], y[2 * i + 1]);
}

// A scale of outputs in steps, and its inverse, rounded once.
struct Step {
  float size, inverse;
};

// Where no product below has anything lost but by its rounding.
__device__ inline bool is_usual_step(float size) { return size >= 0x1p-96f && size <= 0x1p96f; }

// y / size, rounded once, to the nearest integer in [-127, 127], -127 for NaN; in the low byte. As a quotient by a
// correctly rounded inverse (Markstein, 1990) it takes 8 instructions, with a division some 18.
__device__ inline uint32_t nearest_step(float y, Step step) {
  const float most = __fmul_rn(step.size, 127.0f);
  y = fminf(fmaxf(y, -most), most);
  float q = __fmul_rn(y, step.inverse);
  q = __fmaf_rn(__fmaf_rn(-step.size, q, y), step.inverse, q);
  q = __fmaf_rn(__fmaf_rn(-step.size, q, y), step.inverse, q);
  return __float_as_uint(__fadd_rn(q, 0x1.8p23f));
}

// Two outputs to the nearest steps of their scales, in e4m3 or int8.
__device__ inline void quantize_pair(uint8_t* q, Dtype out, const float* y, const float* scale) {
  const float first = __fdiv_rn(y[0], scale[0]), second = __fdiv_rn(y[1], scale[1]);
  if (out == Dtype::e4m3) {
    const uint16_t pair = to_e4m3x2(second, first);
    q[0] = pair & 0xff;
    q[1] = pair >> 8;
  } else {  // fmaxf gives -127 for NaN, as every backend does
    q[0] = __float2int_rn(fminf(fmaxf(first, -127.0f), 127.0f));
    q[1] = __float2int_rn(fminf(fmaxf(second, -127.0f), 127.0f));
  }
}

}  // namespace forwardpass
