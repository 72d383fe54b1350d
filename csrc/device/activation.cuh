#pragma once
// Activations in fp32, chosen at run time: the branch is the same for all threads of a launch. Errors in units of |x|,
// from those that the CUDA guide and the PTX ISA give for the functions used: gelu 2^-22.3 (erff: 2 ulp), gelu_tanh and
// silu 2^-21.6 (ex2.approx 2^-22, div.approx 2 ulp), hard_swish 2^-22. NaN gives NaN, +infinity itself (relu6: 6),
// -infinity NaN, as torch's fp64 formulas do.
#include "device/ptx_sm80.cuh"
#include "params/common.h"

namespace forwardpass {

// x / (1 + e^-z), where z has the sign of x. Where e^-z overflows the quotient is -0, or NaN for -infinity / infinity;
// __fdividef gives 0 from 2^126 on, where the true value is below 2^-119. __expf would take three instructions more to
// keep an e^-z that is denormal, to which 1 is added.
__device__ inline float times_sigmoid(float x, float z) {
  constexpr float kLog2e = 1.44269504f;
  return __fdividef(x, 1.0f + ptx::ex2(-z * kLog2e));
}

__device__ inline float silu(float x) { return times_sigmoid(x, x); }

// 0.5 x (1 + tanh u) = x / (1 + e^-2u), u = sqrt(2 / pi) (x + 0.044715 x^3): tanhf would take a branch on the value
__device__ inline float gelu_tanh(float x) { return times_sigmoid(x, x * fmaf(x * x, 0.0713548163f, 1.59576912f)); }

__device__ inline float gelu(float x) { return 0.5f * x * (1.0f + erff(x * 0.707106781f)); }

__device__ inline float relu(float x) { return x < 0 ? 0.0f : x; }

__device__ inline float relu6(float x) { return x > 6 ? 6.0f : relu(x); }

// x relu6(x + 3) / 6, the same operations as on a CPU, and so the same bits.
__device__ inline float hard_swish(float x) { return __fmul_rn(x, __fmul_rn(relu6(__fadd_rn(x, 3.0f)), 1.0f / 6)); }

// v = f(v) for each of N values.
template <int N, class F>
__device__ inline void apply(float (&v)[N], F f) {
#pragma unroll
  for (int i = 0; i < N; ++i) v[i] = f(v[i]);
}

// The activation of each value, or that of a gate. The branch is around the loop: in it, the values would wait for one
// another.
template <int N>
__device__ inline void activate(Activation activation, float (&v)[N]) {
  switch (activation) {
    case Activation::none:
      return;
    case Activation::relu:
      return apply(v, relu);
    case Activation::gelu:
    case Activation::gelu_mul:
      return apply(v, gelu);
    case Activation::gelu_tanh:
    case Activation::gelu_tanh_mul:
      return apply(v, gelu_tanh);
    case Activation::silu:
    case Activation::silu_mul:
      return apply(v, silu);
    case Activation::relu6:
      return apply(v, relu6);
    case Activation::hard_swish:
      return apply(v, hard_swish);
  }
}

}  // namespace forwardpass
