#pragma once
// The epilogue on the CPU: rows of accumulators -> output (csrc/common/params.h, Epilogue).
#include "cpu/activation.h"

namespace forwardpass::cpu {

INLINE f32x16 load_bias(const Epilogue& e, int64_t c, int n) {
  if (!e.bias) return f32x16{};
  switch (e.bias_dtype) {
    case Dtype::f32:
      return load<Dtype::f32>(e.bias, c, n);
    case Dtype::f16:
      return load<Dtype::f16>(e.bias, c, n);
    default:
      return load<Dtype::bf16>(e.bias, c, n);
  }
}

INLINE void store_output(const Epilogue& e, f32x16 y, int64_t row, int64_t c, int n) {
  const int64_t at = row * e.out_stride + c;
  switch (e.out_dtype) {
    case Dtype::f32:
      return store<Dtype::f32>(y, e.out, at, n);
    case Dtype::f16:
      return store<Dtype::f16>(y, e.out, at, n);
    case Dtype::bf16:
      return store<Dtype::bf16>(y, e.out, at, n);
    default:
      break;
  }
  y /= e.out_scale_per_column ? load<Dtype::f32>(e.out_scale, c, n) : splat(*e.out_scale);
  auto q = static_cast<uint8_t*>(e.out) + at;
  if (e.out_dtype == Dtype::e4m3) return store_bits(to_e4m3(y), q, n);
  store_bits(__builtin_convertvector(to_int(y, -127.0f, 127.0f), i8x16), q, n);
}

// acc: one row of int32 or fp32 accumulators, `columns` of them; row: where it goes in the output.
template <Dtype Acc>
INLINE void epilogue_row(const Epilogue& e, const void* acc, int64_t row, int64_t columns) {
  const float a_scale = e.a_scale ? e.a_scale[e.a_scale_per_row ? row : 0] : 1.0f;
  const int32_t zero_point = e.zero_point ? e.zero_point[e.zero_point_per_row ? row : 0] : 0;
  for_each_vector(
      0, columns, VECTOR_BODY(&) {
        f32x16 v;
        if constexpr (Acc == Dtype::i32) {
          i32x16 i = load_bits<i32x16>(static_cast<const int32_t*>(acc) + c, n);
          if (e.zero_point) i -= zero_point * load_bits<i32x16>(e.b_sum + c, n);
          v = __builtin_convertvector(i, f32x16);
        } else {
          v = load<Dtype::f32>(acc, c, n);
        }
        const f32x16 b_scale =
            e.b_scale_per_column ? load<Dtype::f32>(e.b_scale, c, n) : splat(e.b_scale ? *e.b_scale : 1.0f);
        const f32x16 y = fma(v, a_scale * b_scale, load_bias(e, c, n));
        if (!is_gated(e.activation)) return store_output(e, activate(e.activation, y), row, c, n);
        f32x16 gate{}, up{};  // columns are a multiple of 16: 8 of gate, 8 of up
        for (int i = 0; i < kLanes / 2; ++i) gate[i] = y[i], up[i] = y[i + kLanes / 2];
        store_output(e, activate(e.activation, gate) * up, row, c / 2, kLanes / 2);
      });
}

}  // namespace forwardpass::cpu
