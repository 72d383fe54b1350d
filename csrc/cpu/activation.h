#pragma once
// Activations on 16 fp32 lanes, without branches on the values. The polynomials are minimax fits in relative error,
// made for these intervals by reweighted least squares. Measured on every 97th float against fp64: the error is at most
// 2^-22.7 |x| for gelu, gelu_tanh and silu (1.2 ulp of x; a result near x is rounded to half of one). With AVX-512:
// 0.23, 0.18 and 0.13 ns an element. NaN gives NaN, +infinity itself, -infinity NaN, as torch's fp64 formulas do
// (infinity * 0), and relu(-infinity) 0.
#include "cpu/vector.h"

namespace forwardpass::cpu {

// Horner's rule, the leading coefficient first.
template <class... C>
INLINE f32x16 polynomial(f32x16 x, float leading, C... rest) {
  f32x16 p = splat(leading);
  ((p = fma(p, x, splat(rest))), ...);
  return p;
}

// 2^y for y <= 0; 0 below -119, so that neither this nor gelu's product with it is denormal: where one value in a
// hundred was, gelu took 1.7 times as long. Adding 1.5 * 2^23 rounds y to an integer, left in the sum's low bits.
INLINE f32x16 exp2_negative(f32x16 y) {
  const f32x16 shifted = y + 0x1.8p23f, r = y - (shifted - 0x1.8p23f);  // r in [-1/2, 1/2], exact
  const f32x16 p = polynomial(r, 0.00015353362f, 0.0013398875f, 0.00961843692f, 0.0555033237f, 0.240226477f,
                              0.693147182f, 1.0f);  // to 2^-28.9
  const f32x16 power = bits<f32x16>((bits<i32x16>(shifted) + 127) << 23);
  return y < -119.0f ? f32x16{} : p * power;
}

// x / (1 + e^-z), where z has the sign of x. From e^-|z|, which cannot overflow: where it did, -infinity / infinity
// would be NaN.
INLINE f32x16 times_sigmoid(f32x16 x, f32x16 z) {
  const f32x16 e = exp2_negative(abs(z) * -1.44269504f);
  return x * ((x < 0 ? e : splat(1)) / (1 + e));
}

INLINE f32x16 silu(f32x16 x) { return times_sigmoid(x, x); }

// 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
INLINE f32x16 gelu_tanh(f32x16 x) { return times_sigmoid(x, x * fma(x * x, splat(0.0713548163f), splat(1.59576912f))); }

// x Phi(x) with Phi(-a) = e^(-a^2 / 2) M(a), M a fraction of polynomials with positive coefficients (to 2^-27.6 for a
// < 13.4), so nothing cancels, and the negative tail keeps its own scale where 1 + erf(x / sqrt 2) would not. A
// polynomial in 1 / (1 + 0.27 a) was tried first: as fast, and twice the error. One for Phi itself in x^2 takes two
// thirds of the time, for a division less, and is as exact, but not in the tail: some values more are then rounded to
// another step of 8 bits than on a GPU. Beyond 14 the power is 0.
INLINE f32x16 gelu(f32x16 x) {
  const f32x16 a = min(abs(x), splat(14));
  const f32x16 m = polynomial(a, 0.00402866583f, 0.0400416292f, 0.18147786f, 0.43591848f, 0.5f) /
                   polynomial(a, 0.0100982273f, 0.10037677f, 0.464831918f, 1.19519687f, 1.66972184f, 1.0f);
  const f32x16 tail = exp2_negative(a * a * -0.721347520f) * m;
  return x * (x < 0 ? tail : 1 - tail);
}

INLINE f32x16 relu(f32x16 x) { return x < 0 ? f32x16{} : x; }

// f(function of 16 lanes): the activation, or that of the gate.
template <class F>
INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none:
      return f([](f32x16 x) __attribute__((always_inline)) { return x; });
    case Activation::relu:
      return f([](f32x16 x) __attribute__((always_inline)) { return relu(x); });
    case Activation::gelu:
    case Activation::gelu_mul:
      return f([](f32x16 x) __attribute__((always_inline)) { return gelu(x); });
    case Activation::gelu_tanh:
    case Activation::gelu_tanh_mul:
      return f([](f32x16 x) __attribute__((always_inline)) { return gelu_tanh(x); });
    case Activation::silu:
    case Activation::silu_mul:
      return f([](f32x16 x) __attribute__((always_inline)) { return silu(x); });
  }
}

// n outputs, 16 or 8, from column c of theirs on: activate(gate) * up, where x has blocks of 8 of gate and 8 of up.
template <Dtype D, class F>
INLINE f32x16 gated(F activate, const void* x, int64_t c, int n) {
  const f32x16 low = load<D>(x, 2 * c), high = load<D>(x, 2 * c + 16, 2 * n - 16);
  const f32x16 gate = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const f32x16 up = __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return activate(gate) * up;
}

}  // namespace forwardpass::cpu
