#pragma once
// Probabilities and v of attention_8bit in 8 bits, on mma.sync and on wgmma: their units, how they are rounded, and
// what their sums are.
#include "device/softmax.cuh"
#include "kernels/attention/int8_operands.h"

namespace forwardpass {

// - kLog2Unit is added to a score, less its block's largest, so that its exponential is in the units that pack()
// rounds.
// - A sum of products as value() returns it, times kOfOutput and its block's weight, is in units of v.
// - kFar: a float of a score beyond it, of either sign, has too few bits behind the point.
// - kUnsigned: v is 128 more. kBlockScales: v has a scale for each block of keys, which is part of the block's weight.
template <Dtype kValues>
struct ValueArithmetic;
template <>
struct ValueArithmetic<Dtype::i8> {
  using Sum = int32_t;
  // p is in units of 2^-24, so that it is one of fp16's denormals once it is rounded to 16 bits, whose bits are the
  // whole number: the largest is 255 of them.
  static constexpr float kLog2Unit = -16.0056467f;  // log2(255) - 24
  static constexpr float kOfOutput = 0x1p16f;       // 2^(149 - 24) / v_unit()
  static constexpr float kFar = 0x1p20f;
  static constexpr bool kUnsigned = true;
  static constexpr bool kBlockScales = true;
  // Four bytes: elements e and e + 1 of two tiles.
  __device__ static uint32_t pack(const float (&low)[4], const float (&high)[4], int e) {
    return __byte_perm(forwardpass::pack<Dtype::f16>(low[e], low[e + 1]),
                       forwardpass::pack<Dtype::f16>(high[e], high[e + 1]), 0x6420);
  }
  // Both operands are unsigned, so a sum is below 2^23 and not negative: the bits of a denormal float, 2^-149 times it.
  __device__ static float value(Sum sum) { return __int_as_float(sum); }
};
// e4m3, of p's largest 448. Tensor cores add these products with fewer bits than a float has, so the sums of a block of
// keys are accumulators of their own.
template <>
struct ValueArithmetic<Dtype::e4m3> {
  using Sum = float;
  static constexpr float kLog2Unit = 8.80735492f;  // log2(448); the sum of p has it too
  static constexpr float kOfOutput = 1;
  static constexpr float kFar = 0x1p16f;  // beyond 2^18 the largest may be less than 432, which is rounded to 416
  static constexpr bool kUnsigned = false;
  static constexpr bool kBlockScales = false;
  __device__ static uint32_t pack(const float (&low)[4], const float (&high)[4], int e) {
    return to_e4m3x2(low[e + 1], low[e]) | uint32_t{to_e4m3x2(high[e + 1], high[e])} << 16;
  }
  __device__ static float value(Sum sum) { return sum; }
};

// What sums of products are multiplied by, of a group's scale and a row's. It is never 0, as 0 times a masked score
// would be NaN: a sum is below 2^23, so this adds less than 2^-103 to a score.
__device__ inline float score_factor(float of_keys, float of_row) { return fmaf(of_keys, of_row, 0x1p-126f); }

template <class Config>
Int8Operands int8_operands(const AttentionParams& p) {
  return Int8Operands::of(p, Config::kHeadDim, Config::kValueDim, Config::Values::kUnsigned, !Config::kModified);
}

}  // namespace forwardpass
