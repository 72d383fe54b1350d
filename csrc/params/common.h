#pragma once
// What the torch side and the kernels share: plain structs, no torch header, no CUDA header.
#include <cstdint>

#ifdef __CUDACC__
#define HOST_DEVICE __host__ __device__
#else
#define HOST_DEVICE
#endif

// A function of the kernel libraries that the torch side looks up by name. A launcher takes a pointer to Params, whose
// kLauncher is its name, and a cudaStream_t, and returns a cudaError_t.
#define KERNEL_LIBRARY extern "C" __attribute__((visibility("default")))

namespace forwardpass {

enum class Dtype : int32_t { f32, f16, bf16, i8, e4m3, i32 };

constexpr int64_t size_of(Dtype t) {
  return t == Dtype::f32 || t == Dtype::i32 ? 4 : t == Dtype::f16 || t == Dtype::bf16 ? 2 : 1;
}

// From silu_mul on they are gated: activation(gate) * up.
enum class Activation : int32_t {
  none,
  relu,
  gelu,
  gelu_tanh,
  silu,
  relu6,
  hard_swish,
  silu_mul,
  gelu_mul,
  gelu_tanh_mul
};
HOST_DEVICE constexpr bool is_gated(Activation a) { return a >= Activation::silu_mul; }

// A matrix in memory: rows of `columns` elements with last stride 1, rows `stride` elements apart.
struct Matrix {
  const void* data;
  Dtype dtype;
  int64_t rows, columns, stride;
};

// How rows of fp32 values are quantised, and where to: the second half of every op that ends in a quantisation. A
// segment is what shares a scale: a whole row (group == columns), or one group of it.
struct QuantizedRows {
  void* q;  // [rows, columns] i8 or e4m3, rows q_stride elements apart
  Dtype dtype;
  int64_t q_stride;
  int64_t columns, group;
  float* scale;         // [rows, groups], groups scale_stride apart, rows contiguous; null: static
  int32_t* zero_point;  // as scale; null: symmetric or static
  int64_t scale_stride;
  const float* channel_scale;        // [columns], multiplies first; null: ones
  const float* static_scale;         // [1]; null: dynamic
  const int32_t* static_zero_point;  // [1]; null: symmetric
  bool symmetric;
  // Columns that are multiplied by a Hadamard matrix of 64, 128 or 256 after channel_scale; 0: none. It divides
  // `columns` and `group`.
  int64_t rotation;
};

// From accumulators acc [rows, columns] to the output, for the GEMMs and for dequant_activation:
//   y = fma(float(acc - zero_point * b_sum), a_scale * b_scale, bias)    each operation rounded once to fp32
//   out = activation(y), gated: activation(gate) * up, gates and ups in blocks of 8 columns each, [rows, columns / 2]
//   out + residual, if there is one; rounded to fp32
//   ada_gate: out * ada_gate of the row's sample, rounded to fp32, + residual, likewise
//   residual_first, of no gated activation: activation(y + residual), the sum rounded to fp32, in place of the others
//   16-bit or fp32: one rounding; i8 and e4m3: sat(rne(out / out_scale))
//   group_scale: e4m3 or i8 as QuantizedRows has it, of what one tile has whole: groups of 128 columns of out or, if
//   group_scale_stride is 0, rows (GEMMs on wgmma and int8 on a CPU only)
struct Epilogue {
  const float* a_scale;       // [rows] or [1]; null: one
  const float* b_scale;       // [columns] or [1]; null: one
  const void* bias;           // [columns] or null
  const int32_t* zero_point;  // [rows] or [1], or null
  const int32_t* b_sum;       // [columns]; goes with zero_point
  const float* out_scale;     // [out columns] or [1]; goes with an i8 or e4m3 output
  float* group_scale;         // [rows, groups], groups group_scale_stride apart, rows contiguous; or null
  int64_t group_scale_stride;
  const void*
      residual;  // [rows, out columns] of out_dtype, which is 16-bit or fp32, rows residual_stride apart; or null
  int64_t residual_stride;
  const void*
      ada_gate;  // [samples, out columns] of out_dtype, rows ada_gate_stride apart; goes with a residual; or null
  int64_t ada_gate_stride, rows_per_sample;
  int64_t rows_before;  // the call's, before row 0: a CPU takes a part of the rows
  void* out;            // rows out_stride elements apart
  int64_t out_stride;
  Dtype bias_dtype, out_dtype;
  Activation activation;
  bool a_scale_per_row, b_scale_per_column, zero_point_per_row, out_scale_per_column;
  bool residual_first;
};

// The least range of a segment: of a smaller one, such as a row of zeros, the reciprocal of the scale would overflow.
// 2^-100, exact in fp32; fp16's least value is 2^-24.
constexpr float kLeastRange = 0x1p-100f;

}  // namespace forwardpass
