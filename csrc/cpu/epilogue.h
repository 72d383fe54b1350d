#pragma once
// The epilogue on the CPU: from rows of accumulators to the output (Epilogue in params/common.h).
#include "cpu/activation.h"

namespace forwardpass::cpu {

// A row goes through the steps of the formula in blocks of this many columns. Each step is a loop without branches over
// the block, which stays in L1. One loop over vectors that contained all branches took 1.5 times as long.
constexpr int64_t kBlock = 512;

// What int8 outputs lie between. g++ does not know that these are constants: for the maximum with a constant it makes a
// comparison and a selection, for that with a register one instruction. 32 x 256 outputs in registers took 0.184 ns
// each, now 0.143 (AVX-512; AVX2 0.284 and 0.245). A product with the reciprocal of the step instead of the division
// behind it would save 4 % of that, and 0.06 ns are lost on looking for quotients close to a half, which it rounds
// otherwise.
struct Bounds {
  float low = -127, high = 127;
  INLINE Bounds() {
#if defined(__x86_64__)
    asm("" : "+x"(low), "+x"(high));
#endif
  }
};

// y[i] = fma(float(acc[first + i] - zero_point * b_sum), a_scale * b_scale, bias) for i < n
template <class V, Dtype Acc>
INLINE void dequantize(const Epilogue& e, const void* acc, int64_t row, int64_t first, int64_t n, float* y) {
  const float a_scale = e.a_scale ? e.a_scale[e.a_scale_per_row ? row : 0] : 1.0f;
  const int32_t zero_point = e.zero_point ? e.zero_point[e.zero_point_per_row ? row : 0] : 0;
  const float *b_scales = e.b_scale_per_column ? e.b_scale + first : nullptr, b_scale = e.b_scale ? *e.b_scale : 1.0f;
  auto with_bias = [&](auto bias) __attribute__((always_inline)) {
    for_each_vector<V>(
        0, n, VECTOR_BODY(&) {
          V v;
          if constexpr (Acc == Dtype::i32) {
            Ints<V> i = load_bits<Ints<V>>(static_cast<const int32_t*>(acc) + first + c, n);
            if (e.zero_point) i -= zero_point * load_bits<Ints<V>>(e.b_sum + first + c, n);
            v = __builtin_convertvector(i, V);
          } else {
            v = load<V, Acc>(acc, first + c, n);
          }
          const V scale = a_scale * (b_scales ? load<V, Dtype::f32>(b_scales, c, n) : splat<V>(b_scale));
          store<Dtype::f32>(fma(v, scale, bias(c, n)), y, c, n);
        });
  };
  if (!e.bias) return with_bias([](int64_t, int) __attribute__((always_inline)) { return V{}; });
  with_float_dtype(e.bias_dtype, [&](auto D) __attribute__((always_inline)) {
    with_bias(VECTOR_BODY(&) { return load<V, decltype(D)::value>(e.bias, first + c, n); });
  });
}

// Stores n outputs from column `first` on.
template <class V>
INLINE void store_block(const Epilogue& e, const float* y, int64_t row, int64_t first, int64_t n) {
  auto out = static_cast<char*>(e.out) + (row * e.out_stride + first) * size_of(e.out_dtype);
  if (!e.out_scale) return from_floats<V>(y, e.out_dtype, n, out);
  const float *scales = e.out_scale_per_column ? e.out_scale + first : nullptr, scale = *e.out_scale;
  auto scaled = [&](int64_t c, int n) __attribute__((always_inline)) {
    return load<V, Dtype::f32>(y, c, n) / (scales ? load<V, Dtype::f32>(scales, c, n) : splat<V>(scale));
  };
  auto q = reinterpret_cast<uint8_t*>(out);
  if (e.out_dtype == Dtype::e4m3) {
    for_each_vector<V>(0, n, VECTOR_BODY(&) { store_bits(to_e4m3(scaled(c, n)), q + c, n); });
  } else {
    const Bounds int8;
    for_each_vector<V>(
        0, n, VECTOR_BODY(&) { store_bits(narrow<Chars<V>>(to_int(scaled(c, n), int8.low, int8.high)), q + c, n); });
  }
}

// Adds the residual to n outputs from column `first` on.
template <class V>
INLINE void add_residual(const Epilogue& e, float* y, int64_t row, int64_t first, int64_t n) {
  with_float_dtype(e.out_dtype, [&](auto D) __attribute__((always_inline)) {
    auto residual = static_cast<const char*>(e.residual) + (row * e.residual_stride + first) * size_of(D);
    for_each_vector<V>(
        0, n, VECTOR_BODY(&) {
          store<Dtype::f32>(load<V, Dtype::f32>(y, c, n) + load<V, decltype(D)::value>(residual, c, n), y, c, n);
        });
  });
}

// Multiplies n outputs from column `first` on by the gate of their row's sample.
template <class V>
INLINE void multiply_by_ada_gate(const Epilogue& e, float* y, int64_t row, int64_t first, int64_t n) {
  with_float_dtype(e.out_dtype, [&](auto D) __attribute__((always_inline)) {
    const int64_t sample = (e.rows_before + row) / e.rows_per_sample;
    auto gate = static_cast<const char*>(e.ada_gate) + (sample * e.ada_gate_stride + first) * size_of(D);
    for_each_vector<V>(
        0, n, VECTOR_BODY(&) {
          store<Dtype::f32>(load<V, Dtype::f32>(y, c, n) * load<V, decltype(D)::value>(gate, c, n), y, c, n);
        });
  });
}

// Whether clamped_rows takes it.
inline bool is_clamped(const Epilogue& e, Dtype acc) {
  const bool clamps =
      e.activation == Activation::none || e.activation == Activation::relu || e.activation == Activation::relu6;
  return clamps && acc == Dtype::i32 && !e.zero_point && !e.residual && e.out_dtype != Dtype::e4m3;
}

// Rows of integers whose outputs are clamp(fma(float(acc), a_scale * b_scale, bias)), as those of a convolution with a
// ReLU: all steps of a vector in registers, with what its columns have in one form for all rows. In passes over a block
// 32 x 512 int8 outputs took 0.7 ns each, half of a 1 x 1 convolution's time of 128 channels by VNNI; so they take 0.3.
template <class V>
INLINE void clamped_rows(const Epilogue& e, const int32_t* acc, int64_t stride, int64_t rows, int64_t columns) {
  const float infinity = __builtin_inff(), low = e.activation == Activation::none ? -infinity : 0.0f,
              high = e.activation == Activation::relu6 ? 6.0f : infinity;
  float scale[kBlock], bias[kBlock], step[kBlock];
  for (int64_t first = 0; first < columns; first += kBlock) {
    const int64_t n = columns - first < kBlock ? columns - first : kBlock;
    const auto fill = [&](float* to, const float* from, bool each) __attribute__((always_inline)) {
      for_each_vector<V>(
          0, n, VECTOR_BODY(&) {
            const V v = each ? load<V, Dtype::f32>(from, first + c, n) : splat<V>(from ? *from : 1.0f);
            store<Dtype::f32>(v, to, c, n);
          });
    };
    fill(scale, e.b_scale, e.b_scale_per_column);
    fill(step, e.out_scale, e.out_scale_per_column);
    with_float_dtype(e.bias_dtype, [&](auto D) __attribute__((always_inline)) {
      for_each_vector<V>(
          0, n, VECTOR_BODY(&) {
            store<Dtype::f32>(e.bias ? load<V, decltype(D)::value>(e.bias, first + c, n) : V{}, bias, c, n);
          });
    });
    const auto each_row = [&](auto put) __attribute__((always_inline)) {
      for (int64_t row = 0; row < rows; ++row) {
        const int32_t* from = acc + row * stride + first;
        const float a_scale = e.a_scale ? e.a_scale[e.a_scale_per_row ? row : 0] : 1.0f;
        auto to = static_cast<char*>(e.out) + (row * e.out_stride + first) * size_of(e.out_dtype);
        const auto vector = VECTOR_BODY(&) {
          V y = fma(load<V, Dtype::i32>(from, c, n), a_scale * load<V, Dtype::f32>(scale, c),
                    load<V, Dtype::f32>(bias, c));
          y = select_less(y, splat<V>(low), splat<V>(low), y);
          y = select_less(splat<V>(high), y, splat<V>(high), y);
          put(y, to, c, n);
        };
        // A rest is made anew with what is before it: parts of vectors are loaded and stored by calls of memcpy.
        for_each_vector<V>(0, n < kLanes<V> ? n : n / kLanes<V> * kLanes<V>, vector);
        if (n > kLanes<V> && n % kLanes<V>) vector(n - kLanes<V>, kLanes<V>);
      }
    };
    if (e.out_dtype == Dtype::i8) {
      const Bounds int8;
      each_row([&](V y, char* to, int64_t c, int n) __attribute__((always_inline)) {
        const Ints<V> q = to_int(y / load<V, Dtype::f32>(step, c), int8.low, int8.high);
        store_bits(narrow<Chars<V>>(q), reinterpret_cast<int8_t*>(to) + c, n);
      });
      continue;
    }
    with_float_dtype(e.out_dtype, [&](auto D) __attribute__((always_inline)) {
      each_row([&](V y, char* to, int64_t c, int n)
                   __attribute__((always_inline)) { store<decltype(D)::value>(y, to, c, n); });
    });
  }
}

// All but the scales of rows. dequantize(c, n, y): y[i] of n columns from c on; row: its row of the output. A residual,
// where there is one, is a constant: looked for in each block it would cost all others.
template <class V, bool kResidual, class F>
INLINE void epilogue_blocks(const Epilogue& e, int64_t row, int64_t columns, F dequantize) {
  float buffer[kBlock];
  for (int64_t c = 0; c < columns; c += kBlock) {
    const int64_t n = columns - c < kBlock ? columns - c : kBlock, columns_per_output = is_gated(e.activation) ? 2 : 1;
    const bool direct = e.out_dtype == Dtype::f32 && columns_per_output == 1;
    float* y = direct ? static_cast<float*>(e.out) + row * e.out_stride + c : buffer;
    dequantize(c, n, y);
    const int64_t first = c / columns_per_output, outputs = n / columns_per_output;
    if (kResidual && e.residual_first) add_residual<V>(e, y, row, c, n);
    if (e.activation != Activation::none) activate({e.activation, Dtype::f32, y, nullptr}, outputs, y);
    if (kResidual && e.ada_gate) multiply_by_ada_gate<V>(e, y, row, first, outputs);
    if (kResidual && !e.residual_first) add_residual<V>(e, y, row, first, outputs);
    if (!direct) store_block<V>(e, y, row, first, outputs);
  }
}

// acc: a row of `columns` int32 or float accumulators.
template <class V, Dtype Acc, bool kResidual>
INLINE void epilogue_row(const Epilogue& e, const void* acc, int64_t row, int64_t columns) {
  epilogue_blocks<V, kResidual>(e, row, columns, [&](int64_t c, int64_t n, float* y) __attribute__((always_inline)) {
    dequantize<V, Acc>(e, acc, row, c, n, y);
  });
}

}  // namespace forwardpass::cpu
