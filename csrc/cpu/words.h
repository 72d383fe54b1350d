#pragma once
// The arithmetics of attention on a CPU.
#include "cpu/vector.h"

namespace forwardpass::cpu {

// Operands are words of 32 bits: floats, to which q, k and v of any dtype D are converted ...
template <class Vector, Dtype D>
struct Floats {
  using V = Vector;
  static constexpr Dtype kDtype = D;
  static constexpr int kElements = 1;  // of a word

  // A broadcast that is one load, where splat also adds zero. It must not replace splat: in the loops of the quantising
  // kernels g++ then built constants lane by lane, which took twice as long.
  INLINE static V broadcast(const float* p) {
    const float v = *p;
    if constexpr (kLanes<V> == 16) {
      return V{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
    } else {
      return V{v, v, v, v, v, v, v, v};
    }
  }
  INLINE static V multiply_add(V a, V b, V sum) {
    if constexpr (kLanes<V> == 4) return a * b + sum;  // plain x86-64 has no fma, and calls a function for each lane
    return fma(a, b, sum);
  }
  INLINE static void store_probabilities(V v, float* row, int64_t column) { store<Dtype::f32>(v, row, column); }
};

#if defined(__x86_64__)
// ... or pairs of bfloat16, of which one instruction adds both products. Written as assembly, as Vnni is.
struct BfloatPairs {
  using V = Vectors<16>::f32;
  static constexpr Dtype kDtype = Dtype::bf16;
  static constexpr int kElements = 2;

  INLINE static V broadcast(const float* p) {
    V v;
    asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
    return v;
  }
  INLINE static V multiply_add(V a, V b, V sum) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
  INLINE static Halves<V> to_bfloat(V v) {
    Halves<V> h;
    asm("vcvtneps2bf16 %1, %0" : "=v"(h) : "v"(v));
    return h;
  }
  INLINE static void store_probabilities(V v, float* row, int64_t column) {
    store_bits(to_bfloat(v), reinterpret_cast<uint16_t*>(row) + column, kLanes<V>);
  }
};
#endif

}  // namespace forwardpass::cpu
