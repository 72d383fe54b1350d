#pragma once
// The arithmetics of attention on a CPU.
#include "cpu/vector.h"

namespace forwardpass::cpu {

// What is loaded once: g++ 12 loaded it again for every use.
template <class V>
INLINE V in_register(V v) {
#if defined(__x86_64__)
  asm("" : "+v"(v));
#endif
  return v;
}

// Operands are words of 32 bits: floats, to which q, k and v of any dtype D are converted ...
template <class Vector, Dtype D>
struct Floats {
  using V = Vector;
  using Sum = V;
  using Words = Floats<V, Dtype::f32>;  // what makes words of floats, for each D the same
  static constexpr Dtype kDtype = D;
  static constexpr int kElements = 1;  // of a word

  // A broadcast that is one load, where splat also adds zero. It must not replace splat: in the loops of the quantising
  // kernels g++ then built constants lane by lane, which took twice as long.
  INLINE static V broadcast(const float* p) {
    const float v = *p;
    if constexpr (kLanes<V> == 16) {
      return V{v, v, v, v, v, v, v, v, v, v, v, v, v, v, v, v};
    } else if constexpr (kLanes<V> == 8) {
      return V{v, v, v, v, v, v, v, v};
    } else {
      return V{v, v, v, v};
    }
  }
  // Words of a row, from its vector `i` on.
  INLINE static V load_words(const void* row, int64_t i) { return in_register(load<V, D>(row, i * kLanes<V>)); }
  INLINE static V multiply_add(V a, V b, V sum) {
    if constexpr (kLanes<V> == 4) return a * b + sum;  // plain x86-64 has no fma, and calls a function for each lane
    return fma(a, b, sum);
  }
  INLINE static void store_probabilities(V v, float* row, int64_t column) { store<Dtype::f32>(v, row, column); }
};

#if defined(__x86_64__)
// What pairs of 16-bit elements share. Written as assembly, as Vnni is.
template <class Vector>
struct Pairs {
  using V = Vector;
  static constexpr int kElements = 2;

  INLINE static V broadcast(const float* p) {
    V v;
    asm("vbroadcastss %1, %0" : "=v"(v) : "m"(*p));
    return v;
  }
  // Pairs of a's and b's elements of one place: of the first four elements of each eight, of the others.
  INLINE static V low_pairs(V a, V b) {
    V v;
    asm("vpunpcklwd %2, %1, %0" : "=v"(v) : "v"(a), "v"(b));
    return v;
  }
  INLINE static V high_pairs(V a, V b) {
    V v;
    asm("vpunpckhwd %2, %1, %0" : "=v"(v) : "v"(a), "v"(b));
    return v;
  }
};

// ... or pairs of bfloat16, of which one instruction adds both products ...
struct BfloatPairs : Pairs<Vectors<16>::f32> {
  using Sum = V;
  using Words = BfloatPairs;
  static constexpr Dtype kDtype = Dtype::bf16;

  INLINE static V load_words(const void* row, int64_t i) {
    return in_register(load<V, Dtype::f32>(row, i * kLanes<V>));
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

// ... or pairs of integers of 16 bits, to which int8 is widened. Sums are exact.
template <class Vector>
struct IntegerPairs : Pairs<Vector> {
  using V = Vector;
  using Sum = Ints<V>;
  using Words = IntegerPairs;
  static constexpr Dtype kDtype = Dtype::i8;

  INLINE static V load_words(const void* row, int64_t i) {
    constexpr int kBytes = 2 * kLanes<V>;
    V v;
    asm("vpmovsxbw %1, %0"
        : "=v"(v)
        : "m"(reinterpret_cast<const char (&)[kBytes]>(static_cast<const char*>(row)[i * kBytes])));
    return v;
  }
  INLINE static Sum multiply_add(V a, V b, Sum sum) {
    Sum products;
    asm("vpmaddwd %2, %1, %0" : "=v"(products) : "v"(a), "v"(b));
    return products + sum;
  }
  static constexpr float kMost = 32767;  // of an integer
  INLINE static void store_integers(Sum v, float* row, int64_t i) {
    store_bits(__builtin_convertvector(v, Halves<V>), reinterpret_cast<uint16_t*>(row) + i, kLanes<V>);
  }
};
struct VnniPairs : IntegerPairs<Vectors<16>::f32> {
  INLINE static Sum multiply_add(V a, V b, Sum sum) {
    asm("vpdpwssd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    return sum;
  }
};
#endif

}  // namespace forwardpass::cpu
