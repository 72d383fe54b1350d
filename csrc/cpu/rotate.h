#pragma once
// The rotation of a row before it is quantised: each `rotation` columns times a Hadamard matrix, by a fast transform.
// Its additions are those of forwardpass.ops.common.rotation.rotate, in that order: the bits are equal.
#include <vector>

#include "cpu/vector.h"

namespace forwardpass::cpu {

// a, b, c, d become (a + b) + (c - d), (a + b) - (c - d), (c + d) + (a - b), (c + d) - (a - b): a regular Hadamard
// matrix of four.
template <class V>
INLINE void rotate_fours(V& a, V& b, V& c, V& d) {
  const V ab = a + b, a_b = a - b, cd = c + d, c_d = c - d;
  a = ab + c_d, b = ab - c_d, c = cd + a_b, d = cd - a_b;
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

// The same of the halves of two vectors: a, b and c, d.
template <class V>
INLINE void rotate_halves(V& x, V& y) {
  constexpr auto lower = [](int lane) { return lane < kLanes<V> / 2 ? lane : lane + kLanes<V> / 2; };
  constexpr auto upper = [](int lane) { return lane < kLanes<V> / 2 ? lane + kLanes<V> / 2 : lane + kLanes<V>; };
  constexpr auto swapped = [](int lane) { return lane ^ (kLanes<V> / 2); };
  const V ac = permute<lower>(x, y), bd = permute<upper>(x, y);
  const V sums = ac + bd, differences = permute<swapped>(ac - bd, ac);  // a + b, c + d; c - d, a - b
  const V even = sums + differences, odd = sums - differences;
  x = permute<lower>(even, odd), y = permute<upper>(even, odd);
}

// 64 columns, in registers.
template <class V>
INLINE void rotate_64(V (&v)[64 / kLanes<V>]) {
  constexpr int kSixteen = 16 / kLanes<V>;  // vectors of 16 columns
  unrolled<64 / kLanes<V>>(UNROLLED_BODY(i) { v[i] = rotate_lanes<1>(v[i]); });
  unrolled<4>(UNROLLED_BODY(i) {
    if constexpr (kLanes<V> == 16) v[i] = rotate_lanes<4>(v[i]);
    if constexpr (kLanes<V> == 8) rotate_halves(v[2 * i], v[2 * i + 1]);
    if constexpr (kLanes<V> == 4) rotate_fours(v[4 * i], v[4 * i + 1], v[4 * i + 2], v[4 * i + 3]);
  });
  unrolled<kSixteen>(
      UNROLLED_BODY(i) { rotate_fours(v[i], v[i + kSixteen], v[i + 2 * kSixteen], v[i + 3 * kSixteen]); });
}

// Parts of 64 columns each, one behind another: two as a + b, a - b, or four.
template <int kParts, class V>
INLINE void rotate_parts(float* x, float norm) {
  for (int64_t c = 0; c < 64; c += kLanes<V>) {
    V v[kParts];
    unrolled<kParts>(UNROLLED_BODY(i) { v[i] = load<V, Dtype::f32>(x, c + 64 * i); });
    if constexpr (kParts == 2) {
      const V difference = v[0] - v[1];
      v[0] += v[1], v[1] = difference;
    } else {
      rotate_fours(v[0], v[1], v[2], v[3]);
    }
    unrolled<kParts>(UNROLLED_BODY(i) { store<Dtype::f32>(v[i] * norm, x, c + 64 * i); });
  }
}

// A row, whose values are value(c, n), rotated. It is this thread's until it rotates another one. In one pass through
// memory for each of 64 columns, and one more for 128 and 256: a pass for each step took twice as long.
template <class V, class Value>
INLINE const float* rotated_row(int64_t columns, int64_t rotation, Value value) {
  thread_local std::vector<float> row;
  if (static_cast<int64_t>(row.size()) < columns) row.resize(columns);
  float* x = row.data();
  const float norm = 1 / std::sqrt(static_cast<float>(rotation)), first = rotation == 64 ? norm : 1;
  for (int64_t begin = 0; begin < columns; begin += rotation) {
    for (int64_t part = begin; part < begin + rotation; part += 64) {
      V v[64 / kLanes<V>];
      unrolled<64 / kLanes<V>>(UNROLLED_BODY(i) { v[i] = value(part + i * kLanes<V>, kLanes<V>); });
      rotate_64<V>(v);
      unrolled<64 / kLanes<V>>(UNROLLED_BODY(i) { store<Dtype::f32>(v[i] * first, x, part + i * kLanes<V>); });
    }
    if (rotation == 128) rotate_parts<2, V>(x + begin, norm);
    if (rotation == 256) rotate_parts<4, V>(x + begin, norm);
  }
  return x;
}

}  // namespace forwardpass::cpu
