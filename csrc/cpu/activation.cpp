#include "cpu/activation.h"

namespace forwardpass::cpu {
namespace {

// Calls f with the activation of those that there are gated too, as a function of a vector.
template <class F>
INLINE void with_gate(Activation activation, F f) {
  switch (activation) {
    case Activation::gelu:
    case Activation::gelu_mul:
      return f([](auto x) __attribute__((always_inline)) { return gelu(x); });
    case Activation::gelu_tanh:
    case Activation::gelu_tanh_mul:
      return f([](auto x) __attribute__((always_inline)) { return gelu_tanh(x); });
    default:
      return f([](auto x) __attribute__((always_inline)) { return silu(x); });
  }
}

// Calls f with the activation, as a function of a vector.
template <class F>
INLINE void with_activation(Activation activation, F f) {
  switch (activation) {
    case Activation::none:
      return f([](auto x) __attribute__((always_inline)) { return x; });
    case Activation::relu:
      return f([](auto x) __attribute__((always_inline)) { return relu(x); });
    case Activation::relu6:
      return f([](auto x) __attribute__((always_inline)) { return relu6(x); });
    case Activation::hard_swish:
      return f([](auto x) __attribute__((always_inline)) { return hard_swish(x); });
    default:
      return with_gate(activation, f);
  }
}

// activate(gate) * up for n outputs from output c on, a multiple of the lanes, where x has 8 columns of gate, 8 of up;
// of 16 lanes n is 16 or 8.
template <class V, Dtype D, class F>
INLINE V gated(F activate, const void* x, int64_t c, int n) {
  if constexpr (kLanes<V> == 16) {
    const V low = load<V, D>(x, 2 * c), high = load<V, D>(x, 2 * c + 16, 2 * n - 16);
    const V gate = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
    const V up = __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    return activate(gate) * up;
  } else {
    const int64_t gate = c / 8 * 16 + c % 8;
    return activate(load<V, D>(x, gate)) * load<V, D>(x, gate + 8);
  }
}

template <class V, Dtype D>
INLINE void activate(const Activated& x, int64_t n, float* to) {
  if (!is_gated(x.activation)) {
    with_activation(x.activation, [&](auto f) __attribute__((always_inline)) {
      for_each_vector<V>(0, n, VECTOR_BODY(&) { store<Dtype::f32>(f(load<V, D>(x.gate, c, n)), to, c, n); });
    });
    return;
  }
  with_gate(x.activation, [&](auto f) __attribute__((always_inline)) {
    if (x.up) {
      for_each_vector<V>(
          0, n, VECTOR_BODY(&) { store<Dtype::f32>(f(load<V, D>(x.gate, c, n)) * load<V, D>(x.up, c, n), to, c, n); });
    } else {
      for_each_vector<V>(0, n, VECTOR_BODY(&) { store<Dtype::f32>(gated<V, D>(f, x.gate, c, n), to, c, n); });
    }
  });
}

}  // namespace

void activate(const Activated& x, int64_t n, float* to) {
  with_vectors(VECTOR_CODE {
    with_float_dtype(x.dtype, [&](auto D) __attribute__((always_inline)) { activate<V, D()>(x, n, to); });
  });
}

}  // namespace forwardpass::cpu
