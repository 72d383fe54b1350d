#pragma once
// The epilogue of eight consecutive columns of a row: the layout of dequant_activation, of the GEMV, of sums over
// splits of K, and of every GEMM's general epilogue, which has each option. Options are branches that are uniform over
// the launch.
#include <type_traits>

#include "device/epilogue/terms.cuh"

namespace forwardpass {

// What may be accessed as 16-byte words, the same for all threads: found once, on the host.
struct EpilogueAccess {
  bool columns, out;
  explicit EpilogueAccess(const Epilogue& e)
      : columns(is_aligned(e.b_scale) && is_aligned(e.bias) && is_aligned(e.b_sum)),
        out(is_aligned(e.out) && e.out_stride * size_of(e.out_dtype) % 16 == 0 && is_aligned(e.out_scale) &&
            is_aligned(e.residual) && e.residual_stride * size_of(e.out_dtype) % 16 == 0 && is_aligned(e.ada_gate) &&
            e.ada_gate_stride * size_of(e.out_dtype) % 16 == 0) {}
};

// n of 8 values from `column` on, or the one value there is.
__device__ inline void load_scales(float (&v)[kVec], const float* p, bool per_column, int64_t column, int n,
                                   bool aligned) {
  if (per_column) return load_floats(v, p + column, n, aligned);
  const float one = p ? *p : 1.0f;
  apply(v, [=](float) { return one; });
}

template <class T>
__device__ inline void to_floats(float (&f)[kVec], const Vec<T>& v) {
#pragma unroll
  for (int i = 0; i < kVec; ++i) f[i] = to_float(v.e[i]);
}

// n of 8 elements of p from `offset` on, in fp32: of fp16 or bf16, which one load serves; or of fp32.
__device__ inline void load_16_bits(float (&v)[kVec], const void* p, Dtype dtype, int64_t offset, int n, bool aligned) {
  const Vec<uint16_t> bits = load_vec(static_cast<const uint16_t*>(p) + offset, n, aligned);
  if (dtype == Dtype::f16) {
    to_floats(v, reinterpret_cast<const Vec<__half>&>(bits));
  } else {
    to_floats(v, reinterpret_cast<const Vec<__nv_bfloat16>&>(bits));
  }
}
__device__ inline void load_typed(float (&v)[kVec], const void* p, Dtype dtype, int64_t offset, int n, bool aligned) {
  if (dtype != Dtype::f32) return load_16_bits(v, p, dtype, offset, n, aligned);
  load_floats(v, static_cast<const float*>(p) + offset, n, aligned);
}

// What every row needs of eight columns from `column` on, n of them inside; b_sum with integers only.
template <class Acc>
struct EpilogueColumns {
  static constexpr bool kInteger = std::is_same_v<Acc, int32_t>;
  float scale[kVec], bias[kVec];
  Vec<int32_t> b_sum;

  __device__ EpilogueColumns(const Epilogue& e, const EpilogueAccess& access, int64_t column, int n) {
    load_scales(scale, e.b_scale, e.b_scale_per_column, column, n, access.columns);
    if (e.bias) {
      load_typed(bias, e.bias, e.bias_dtype, column, n, access.columns);
    } else {
      apply(bias, [](float) { return 0.0f; });
    }
    if (kInteger && e.zero_point) b_sum = load_vec(e.b_sum + column, n, access.columns);
  }
};

__device__ inline float row_scale(const Epilogue& e, int64_t row) {
  return e.a_scale ? e.a_scale[e.a_scale_per_row ? row : 0] : 1.0f;
}
// Eight columns of a row, as the terms of the epilogue take them.
template <class Acc>
struct RowOfEight {
  float a_scale;
  const EpilogueColumns<Acc>& columns;

  __device__ float row_scale(int) const { return a_scale; }
  __device__ ColumnTerms column(int i) const { return {columns.scale[i], columns.bias[i]}; }
};

template <class Acc>
__device__ inline void dequantize(float (&y)[kVec], Vec<Acc> acc, const Epilogue& e,
                                  const EpilogueColumns<Acc>& columns, int64_t row) {
  if constexpr (EpilogueColumns<Acc>::kInteger)
    if (e.zero_point) subtract_zero_point(acc.e, e.zero_point[e.zero_point_per_row ? row : 0], columns.b_sum.e);
  dequantize(y, acc.e, RowOfEight<Acc>{row_scale(e, row), columns});
}

// Outputs of 8 bits.
__device__ inline void store_quantized(const float (&y)[kVec], const Epilogue& e, const EpilogueAccess& access,
                                       int64_t offset, int64_t column, int n) {
  float scale[kVec];
  load_scales(scale, e.out_scale, e.out_scale_per_column, column, n, access.out);
  Vec<uint8_t> q;
#pragma unroll
  for (int i = 0; i < kVec; i += 2) quantize_pair(q.e + i, e.out_dtype, y + i, scale + i);
  store_vec(q, static_cast<uint8_t*>(e.out) + offset, n, access.out);
}

// n of 8 elements of the outputs' type. k16Bits: outputs of 16 bits are all that there are.
template <bool k16Bits>
__device__ inline void load_as_outputs(float (&v)[kVec], const void* p, const Epilogue& e, const EpilogueAccess& access,
                                       int64_t offset, int n) {
  if constexpr (k16Bits) {
    load_16_bits(v, p, e.out_dtype, offset, n, access.out);
  } else {
    load_typed(v, p, e.out_dtype, offset, n, access.out);
  }
}
// y + residual, at columns [column, column + n) of the output.
template <bool k16Bits>
__device__ inline void add_residual(float (&y)[kVec], const Epilogue& e, const EpilogueAccess& access, int64_t row,
                                    int64_t column, int n) {
  float residual[kVec];
  load_as_outputs<k16Bits>(residual, e.residual, e, access, row * e.residual_stride + column, n);
  add_residual(y, residual);
}
// y * ada_gate, at the same columns.
template <bool k16Bits>
__device__ inline void multiply_by_ada_gate(float (&y)[kVec], const Epilogue& e, const EpilogueAccess& access,
                                            int64_t row, int64_t column, int n) {
  float gate[kVec];
  load_as_outputs<k16Bits>(gate, e.ada_gate, e, access, sample_of(e, row) * e.ada_gate_stride + column, n);
  multiply_by_ada_gate(y, gate);
}

// The residual that follows the activation, and one rounding to the output's type; or that to the nearest step of
// out_scale.
template <bool k16Bits>
__device__ inline void store_output(float (&y)[kVec], const Epilogue& e, const EpilogueAccess& access, int64_t row,
                                    int64_t column, int n) {
  if (e.residual && !e.residual_first) {
    if (e.ada_gate) multiply_by_ada_gate<k16Bits>(y, e, access, row, column, n);
    add_residual<k16Bits>(y, e, access, row, column, n);
  }
  const int64_t offset = row * e.out_stride + column;
  if (!k16Bits && e.out_dtype == Dtype::f32)
    return store_vec(reinterpret_cast<const Vec<float>&>(y), static_cast<float*>(e.out) + offset, n, access.out);
  if (k16Bits || e.out_dtype == Dtype::f16 || e.out_dtype == Dtype::bf16) {
    Vec<uint16_t> v;
    auto& pair = reinterpret_cast<uint32_t (&)[kVec / 2]>(v);
    if (e.out_dtype == Dtype::bf16) {
      round_pairs<Dtype::bf16>(pair, y);
    } else {
      round_pairs<Dtype::f16>(pair, y);
    }
    return store_vec(v, static_cast<uint16_t*>(e.out) + offset, n, access.out);
  }
  if constexpr (!k16Bits) store_quantized(y, e, access, offset, column, n);
}

// Eight accumulators of a row to the values of the output; gated: eight gates, and their ups from column + 8 on.
// columns(): the EpilogueColumns of the eight, asked for after those of the ups are done with.
template <class Acc, class Columns>
__device__ inline void epilogue_values(float (&y)[kVec], const Epilogue& e, const EpilogueAccess& access,
                                       const Columns& columns, int64_t row, int64_t column, int n, const Vec<Acc>& acc,
                                       const Vec<Acc>& up) {
  const bool gated = is_gated(e.activation);
  float y_up[kVec];
  if (gated) dequantize(y_up, up, e, EpilogueColumns<Acc>(e, access, column + kVec, n), row);
  dequantize(y, acc, e, columns(), row);
  // Of int8's products alone, as convolutions are; in e4m3's kernels it would spill.
  if constexpr (std::is_same_v<Acc, int>)
    if (e.residual && e.residual_first) add_residual<false>(y, e, access, row, column, n);
  activate(e.activation, y);
  if (gated) multiply_by_up(y, y_up);
}

}  // namespace forwardpass
