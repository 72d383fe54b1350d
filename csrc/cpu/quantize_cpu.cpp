#include <torch/csrc/stable/ops.h>

#include "cpu/quantize_rows.h"
#include "cpu/rotate.h"
#include "cpu/vector.h"
#include "params/quantize.h"

namespace forwardpass {
namespace {

using namespace cpu;

// value(c, n): the row's fp32 values in the lanes from column c on, zero from c + n on, scaled and rotated.
// Evaluated twice, INLINE.
template <class V, class Value>
INLINE void quantize_segment(const QuantizedRows& out, int64_t row, int64_t group, Value value) {
  const int64_t begin = group * out.group, end = begin + out.group < out.columns ? begin + out.group : out.columns;
  const bool e4m3 = out.dtype == Dtype::e4m3, symmetric = out.symmetric;
  float inverse;
  int32_t zero_point = 0;
  if (out.static_scale) {
    inverse = 1.0f / *out.static_scale;
    if (out.static_zero_point) zero_point = *out.static_zero_point;
  } else {
    // Compared as integers, magnitudes are ordered as the floats are, with infinity and NaN on top: a NaN makes the
    // scale NaN and cannot get lost.
    Uints<V> highs{}, lows{};  // of the values >= 0, and of those < 0
    for_each_vector<V>(
        begin, end, VECTOR_BODY(&) {
          const Uints<V> b = bits<Uints<V>>(value(c, n)), a = b & 0x7fffffff,
                         negative = bits<Uints<V>>(bits<Ints<V>>(b) >> 31);
          highs = max(highs, a & ~negative);
          lows = max(lows, a & negative);
        });
    const uint32_t high = largest(highs), low = largest(lows);
    float range = symmetric ? bits<float>(high > low ? high : low) : bits<float>(high) + bits<float>(low);
    range = range < kLeastRange ? kLeastRange : range;
    const float steps = e4m3 ? 448.0f : symmetric ? 127.0f : 255.0f;
    inverse = steps / range;
    out.scale[row + group * out.scale_stride] = range / steps;
    if (out.zero_point) {
      zero_point = -128 + static_cast<int32_t>(__builtin_rintf(std::isnan(range) ? 0.0f : bits<float>(low) * inverse));
      out.zero_point[row + group * out.scale_stride] = zero_point;
    }
  }
  auto q = static_cast<uint8_t*>(out.q) + row * out.q_stride;
  if (e4m3) {
    for_each_vector<V>(begin, end, VECTOR_BODY(&) { store_bits(to_e4m3(value(c, n) * inverse), q + c, n); });
  } else {  // clamping first gives the same as clamping the rounded value, and keeps to_int in its range
    const float low = (symmetric ? -127 : -128) - zero_point, high = 127 - zero_point;
    for_each_vector<V>(
        begin, end, VECTOR_BODY(&) {
          store_bits(narrow<Chars<V>>(to_int(value(c, n) * inverse, low, high) + zero_point), q + c, n);
        });
  }
}

template <class V, class Value>
INLINE void quantize_segments(const QuantizedRows& out, int64_t row, Value value) {
  for (int64_t group = 0; group * out.group < out.columns; ++group) quantize_segment<V>(out, row, group, value);
}

// Compiled once for all values that are rotated.
template <class V>
INLINE void quantize_rotated(const QuantizedRows& out, int64_t row, const float* rotated) {
  apart<V>(
      APART_CODE { quantize_segments<V>(out, row, VECTOR_BODY(=) { return load<V, Dtype::f32>(rotated, c, n); }); });
}

template <class V, class Value>
INLINE void quantize_scaled(const QuantizedRows& out, int64_t row, Value value) {
  if (out.rotation == 0) return quantize_segments<V>(out, row, value);
  quantize_rotated<V>(out, row, rotated_row<V>(out.columns, out.rotation, value));
}

// Every group of a row whose values, before channel_scale and rotation, are value(c, n).
template <class V, class Value>
INLINE void quantize_row(const QuantizedRows& out, int64_t row, Value value) {
  if (const float* s = out.channel_scale)
    quantize_scaled<V>(out, row, VECTOR_BODY(&) { return value(c, n) * load<V, Dtype::f32>(s, c, n); });
  else
    quantize_scaled<V>(out, row, value);
}

template <class V, Dtype D>
INLINE void rows(const QuantizeParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(p.x.data) + row * p.x.stride * size_of(D);
    quantize_row<V>(p.out, row, VECTOR_BODY(=) { return load<V, D>(x, c, n); });
  }
}

}  // namespace

void quantize_rows(const QuantizeParams& p, int64_t first, int64_t last) {
  with_vectors(VECTOR_CODE {
    with_float_dtype(p.x.dtype, [&](auto D) __attribute__((always_inline)) { rows<V, D()>(p, first, last); });
  });
}

void quantize_cpu(const QuantizeParams& p) {
  torch::stable::parallel_for(0, p.x.rows, grain(p.x.columns),
                              [&](int64_t first, int64_t last) { quantize_rows(p, first, last); });
}

}  // namespace forwardpass
