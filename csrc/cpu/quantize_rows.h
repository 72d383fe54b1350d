#pragma once
// The second half of every quantising op on the CPU: a segment of fp32 values (a row, or one group of it) -> q, scale, zero_point.
#include "cpu/vector.h"

namespace forwardpass::cpu {

// v(c) is the value at column c of the row, before channel_scale; it must be INLINE and is evaluated twice.
template <class Value>
INLINE void quantize_segment(const QuantizedRows& out, int64_t row, int64_t group, Value v) {
  const int64_t begin = group * out.group, end = begin + out.group < out.columns ? begin + out.group : out.columns;
  const float* channel_scale = out.channel_scale;
  const bool e4m3 = out.dtype == Dtype::e4m3;
  float inverse;
  int32_t zero_point = 0;
  if (out.static_scale) {
    inverse = 1.0f / *out.static_scale;
    if (out.static_zero_point) zero_point = *out.static_zero_point;
  } else {
    // Integers order as the floats' magnitudes do, with infinity and NaN on top: a NaN makes the scale NaN, never disappears.
    uint32_t high = 0, low = 0;  // largest |v| among v >= 0 and among v < 0
    for (int64_t c = begin; c < end; ++c) {
      const uint32_t b = bits<uint32_t>(v(c) * (channel_scale ? channel_scale[c] : 1.0f)), a = b & 0x7fffffff;
      const uint32_t positive = b >> 31 ? 0 : a, negative = b >> 31 ? a : 0;
      high = high > positive ? high : positive;
      low = low > negative ? low : negative;
    }
    const uint32_t most = high > low ? high : low;
    // a NaN on either side makes the sum NaN
    float range = out.symmetric ? bits<float>(most) : bits<float>(high) + bits<float>(low);
    range = range < kLeastRange ? kLeastRange : range;
    const float steps = e4m3 ? 448.0f : out.symmetric ? 127.0f : 255.0f;
    inverse = steps / range;
    out.scale[row + group * out.scale_stride] = range / steps;
    if (out.zero_point) {
      zero_point = -128 + to_int(bits<float>(low) * inverse, 0.0f, 255.0f);
      out.zero_point[row + group * out.scale_stride] = zero_point;
    }
  }
  auto q = static_cast<uint8_t*>(out.q) + row * out.q_stride;
  if (e4m3) {
    for (int64_t c = begin; c < end; ++c) q[c] = to_e4m3(v(c) * (channel_scale ? channel_scale[c] : 1.0f) * inverse);
  } else {
    const float least = out.symmetric ? -127.0f : -128.0f - zero_point, greatest = out.symmetric ? 127.0f : 127.0f - zero_point;
    for (int64_t c = begin; c < end; ++c)
      q[c] = static_cast<uint8_t>(to_int(v(c) * (channel_scale ? channel_scale[c] : 1.0f) * inverse, least, greatest) + zero_point);
  }
}

}  // namespace forwardpass::cpu
