#pragma once
// Rotary embedding of a row on a CPU: append_kv and encoder_layer.
#include "cpu/vector.h"

namespace forwardpass::cpu {

// The first `rotated` columns of a row, as AppendKvParams (params/append_kv.h) says.
template <class V>
INLINE void rotate(float* row, const float* cos, const float* sin, int64_t rotated, bool interleaved) {
  const int64_t half = rotated / 2;
  if (interleaved) {
    for (int64_t c = 0; c < rotated; c += 2) {
      const float low = row[c], high = row[c + 1];
      row[c] = low * cos[c] - high * sin[c];
      row[c + 1] = high * cos[c + 1] + low * sin[c + 1];
    }
    return;
  }
  for_each_vector<V>(
      0, half, VECTOR_BODY(=) {
        const auto part = [&](const float* x, int64_t first)
                              __attribute__((always_inline)) { return load<V, Dtype::f32>(x, first + c, n); };
        const V low = part(row, 0), high = part(row, half);
        store<Dtype::f32>(low * part(cos, 0) - high * part(sin, 0), row, c, n);
        store<Dtype::f32>(high * part(cos, half) + low * part(sin, half), row, half + c, n);
      });
}

}  // namespace forwardpass::cpu
