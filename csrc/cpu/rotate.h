#pragma once
// The rotation of a row before it is quantised: each `rotation` columns times a Hadamard matrix, by a fast transform.
// Its additions are those of forwardpass.ops.common.rotation.rotate, in that order: the bits are equal.
#include <vector>

#include "cpu/vector.h"

namespace forwardpass::cpu {

// a, b, c, d become (a + b) + (c - d), (a + b) - (c - d), (c + d) + (a - b), (c + d) - (a - b): a regular Hadamard
// matrix of four. The four are vectors, `step` columns apart.
template <class V>
INLINE void rotate_fours(float* x, int64_t step) {
  const V a = load<V, Dtype::f32>(x, 0), b = load<V, Dtype::f32>(x, step), c = load<V, Dtype::f32>(x, 2 * step),
          d = load<V, Dtype::f32>(x, 3 * step);
  const V sum = a + b, difference = a - b, sum2 = c + d, difference2 = c - d;
  store<Dtype::f32>(sum + difference2, x, 0);
  store<Dtype::f32>(sum - difference2, x, step);
  store<Dtype::f32>(sum2 + difference, x, 2 * step);
  store<Dtype::f32>(sum2 - difference, x, 3 * step);
}

// Which of four lanes that are kStep apart this is, and the lane that is number `to` of them.
template <int kStep>
constexpr int number_of(int lane) {
  return lane / kStep % 4;
}
template <int kStep>
constexpr int lane_of(int lane, int to) {
  return lane + (to - number_of<kStep>(lane)) * kStep;
}

// The same of four lanes that are kStep apart: a factor of -1 is exact.
template <int kStep, class V>
INLINE V rotate_lanes(V x) {
  constexpr auto partner = [](int lane) { return lane ^ kStep; };
  constexpr auto first = [](int lane) { return lane_of<kStep>(lane, number_of<kStep>(lane) < 2 ? 0 : 3); };
  constexpr auto second = [](int lane) { return lane_of<kStep>(lane, number_of<kStep>(lane) < 2 ? 2 : 1); };
  V of_x, of_partner, of_second;
  for (int i = 0; i < kLanes<V>; ++i) {  // constants
    of_x[i] = number_of<kStep>(i) == 1 ? -1 : 1;
    of_partner[i] = number_of<kStep>(i) == 2 ? -1 : 1;
    of_second[i] = number_of<kStep>(i) % 2 ? -1 : 1;
  }
  const V sums = x * of_x + permute<partner>(x, x) * of_partner;  // a + b, a - b, c - d, c + d
  return permute<first>(sums, sums) + permute<second>(sums, sums) * of_second;
}

template <class V>
INLINE void rotate_block(float* x, int64_t columns) {
  for (int64_t c = 0; c < columns; c += kLanes<V>) {
    V v = rotate_lanes<1>(load<V, Dtype::f32>(x, c));
    if constexpr (kLanes<V> == 16) v = rotate_lanes<4>(v);
    store<Dtype::f32>(v, x, c);
  }
  int64_t step = kLanes<V> == 16 ? 16 : 4;
  for (; 4 * step <= columns; step *= 4)
    for (int64_t c = 0; c < columns; c += 4 * step) {
      if (step < kLanes<V>) {  // 8 lanes, and 4 columns
        rotate_fours<Vectors<4>::f32>(x + c, step);
      } else {
        for (int64_t i = 0; i < step; i += kLanes<V>) rotate_fours<V>(x + c + i, step);
      }
    }
  if (step < columns) {  // 128 columns
    for (int64_t i = 0; i < step; i += kLanes<V>) {
      const V a = load<V, Dtype::f32>(x, i), b = load<V, Dtype::f32>(x, i + step);
      store<Dtype::f32>(a + b, x, i);
      store<Dtype::f32>(a - b, x, i + step);
    }
  }
}

// A row, whose values are value(c, n), rotated. It is this thread's until it rotates another one.
template <class V, class Value>
INLINE const float* rotated_row(int64_t columns, int64_t rotation, Value value) {
  thread_local std::vector<float> row;
  if (static_cast<int64_t>(row.size()) < columns) row.resize(columns);
  float* x = row.data();
  const float norm = 1 / std::sqrt(static_cast<float>(rotation));
  for (int64_t begin = 0; begin < columns; begin += rotation) {
    for (int64_t c = begin; c < begin + rotation; c += kLanes<V>) store<Dtype::f32>(value(c, kLanes<V>), x, c);
    rotate_block<V>(x + begin, rotation);
    for (int64_t c = begin; c < begin + rotation; c += kLanes<V>)
      store<Dtype::f32>(load<V, Dtype::f32>(x, c) * norm, x, c);
  }
  return x;
}

}  // namespace forwardpass::cpu
