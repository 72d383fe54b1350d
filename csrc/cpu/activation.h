#pragma once
// Activations on fp32 lanes, without branches on the values. The polynomials are minimax fits in relative error,
// made for these intervals by reweighted least squares. Measured on every 97th float against fp64: the error is at most
// 2^-22.7 |x| for gelu, gelu_tanh and silu (1.2 ulp of x; a result near x is rounded to half of one). With AVX-512:
// 0.23, 0.18 and 0.13 ns an element. NaN gives NaN, +infinity itself, -infinity NaN, as torch's fp64 formulas do
// (infinity * 0), and relu(-infinity) 0; relu6(infinity) is 6.
#include "cpu/vector.h"

namespace forwardpass::cpu {

// Horner's rule, the leading coefficient first.
template <class V, class... C>
INLINE V polynomial(V x, float leading, C... rest) {
  V p = splat<V>(leading);
  ((p = fma(p, x, splat<V>(rest))), ...);
  return p;
}

// 2^y for y <= 0, where half_power(r) is 2^(r - 1); r is what y has more than the nearest integer. Below -119 it is 0,
// so that neither it nor gelu's product with it is denormal: with one denormal in a hundred values gelu took 1.7 times
// as long. Adding 1.5 * 2^23 rounds y to an integer, in the low bits of the sum. With 128 more they are an exponent, of
// 2 to that integer plus 1.
template <class V, class F>
INLINE V exp2_negative(V y, F half_power) {
  const V shifted = y + (0x1.8p23f + 128), r = y - (shifted - (0x1.8p23f + 128));  // r in [-1/2, 1/2], exact
  const V power = bits<V>(bits<Ints<V>>(shifted) << 23);
  return select_less(y, splat<V>(-119.0f), V{}, half_power(r) * power);
}
template <class V>
INLINE V exp2_negative(V y) {
  return exp2_negative(y, [](V r) __attribute__((always_inline)) {  // to 2^-28.9
    return polynomial(r, 0.00015353362f / 2, 0.0013398875f / 2, 0.00961843692f / 2, 0.0555033237f / 2, 0.240226477f / 2,
                      0.693147182f / 2, 0.5f);
  });
}

// x / (1 + e^-z), where z has the sign of x. It is computed from e^-|z|, which cannot overflow: after an overflow
// -infinity / infinity would give NaN.
template <class V>
INLINE V times_sigmoid(V x, V z) {
  const V e = exp2_negative(abs(z) * -1.44269504f);
  return x * (select_less(x, V{}, e, splat<V>(1.0f)) / (1 + e));
}

template <class V>
INLINE V silu(V x) {
  return times_sigmoid(x, x);
}

// 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3)
template <class V>
INLINE V gelu_tanh(V x) {
  return times_sigmoid(x, x * fma(x * x, splat<V>(0.0713548163f), splat<V>(1.59576912f)));
}

// x Phi(x), where Phi(-a) = e^(-a^2 / 2) M(a), and M is a ratio of polynomials with positive coefficients (relative
// error 2^-27.6 for a < 13.4). So nothing cancels, and the negative tail keeps its relative accuracy, which
// 1 + erf(x / sqrt 2) would lose. Two alternatives were tried: a polynomial in 1 / (1 + 0.27 a) is as fast, with twice
// the error. A polynomial in x^2 for Phi itself saves the division and a third of the time, but is less exact in the
// tail, where more values then round to another 8-bit step than on a GPU. Beyond a = 14 the power is 0.
template <class V>
INLINE V gelu(V x) {
  const V a = min(abs(x), splat<V>(14.0f));
  const V m = polynomial(a, 0.00402866583f, 0.0400416292f, 0.18147786f, 0.43591848f, 0.5f) /
              polynomial(a, 0.0100982273f, 0.10037677f, 0.464831918f, 1.19519687f, 1.66972184f, 1.0f);
  const V tail = exp2_negative(a * a * -0.721347520f) * m;
  return x * select_less(x, V{}, tail, 1 - tail);
}

template <class V>
INLINE V relu(V x) {
  return select_less(x, V{}, V{}, x);
}

template <class V>
INLINE V relu6(V x) {
  return select_less(splat<V>(6.0f), x, splat<V>(6.0f), relu(x));
}

// x relu6(x + 3) / 6, the same operations as on a GPU, and so the same bits: g++ may not join the product and a sum.
template <class V>
INLINE V hard_swish(V x) {
  return x * (relu6(x + 3.0f) * (1.0f / 6));
}

// What an activation is applied to, of a float dtype: gate[i]. If it is gated, the result is multiplied by up[i]; where
// up is null, gate has 8 columns of gate, 8 of up, and so on.
struct Activated {
  Activation activation;
  Dtype dtype;
  const void *gate, *up;
};

// n outputs in fp32 to `to`, which may be the gate. Compiled in activation.cpp alone.
void activate(const Activated& x, int64_t n, float* to);

}  // namespace forwardpass::cpu
