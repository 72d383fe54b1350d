#pragma once
// What the CPU kernels share: fp32 lanes as a g++ vector type V, one register of the tier: 16 with AVX-512, 8 with
// AVX2, 4 without. A kernel's code is called by `with_vectors`, which compiles it for each and runs the tier's; all
// functions that it calls must be INLINE to be compiled with it. Loops left to the auto-vectoriser were tried first: it
// gave up on most of them, at 3.4 ns an element. Then one type of 16 lanes was, which for AVX2 g++ was to split in two:
// comparisons and shuffles it split into lanes, and gelu took 3.2 ns an element.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

#include "cpu/tier.h"
#include "params/common.h"

#define INLINE inline __attribute__((always_inline))
// Code for with_vectors: V is the type of its vectors.
#define VECTOR_CODE [&]<class V>(V) __attribute__((always_inline))

namespace forwardpass::cpu {

// Vectors of as many lanes.
template <int kLanes>
struct Vectors;
#define VECTORS(lanes)                                            \
  template <>                                                     \
  struct Vectors<lanes> {                                         \
    using f32 = float __attribute__((vector_size(4 * lanes)));    \
    using i32 = int32_t __attribute__((vector_size(4 * lanes)));  \
    using u32 = uint32_t __attribute__((vector_size(4 * lanes))); \
    using u16 = uint16_t __attribute__((vector_size(2 * lanes))); \
    using i8 = int8_t __attribute__((vector_size(lanes)));        \
    using u8 = uint8_t __attribute__((vector_size(lanes)));       \
  }
VECTORS(4);
VECTORS(8);
VECTORS(16);
#undef VECTORS
constexpr int kMostLanes = 16;

template <class V>
constexpr int kLanes = sizeof(V) / sizeof(V{}[0]);
template <class V>
using Ints = typename Vectors<kLanes<V>>::i32;
template <class V>
using Uints = typename Vectors<kLanes<V>>::u32;
template <class V>
using Halves = typename Vectors<kLanes<V>>::u16;
template <class V>
using Chars = typename Vectors<kLanes<V>>::i8;
template <class V>
using Bytes = typename Vectors<kLanes<V>>::u8;

// f(0), f(1), ... f(N - 1), as constants. Of loops that are unrolled later g++ keeps an array of vectors in memory.
template <int N, class F>
INLINE void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}
#define UNROLLED_BODY(i) [&](auto i) __attribute__((always_inline))

// Lane i of the result is lane f(i) of a and, behind it, b.
template <auto F, class V>
INLINE V permute(V a, V b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, F(I)...);
  }(std::make_integer_sequence<int, kLanes<V>>{});
}

#if defined(__x86_64__)
template <class F>
__attribute__((noinline, target("arch=x86-64-v4"))) void with_avx512(const F& code) {
  code(Vectors<16>::f32{});
}
template <class F>
__attribute__((noinline, target("arch=x86-64-v3"))) void with_avx2(const F& code) {
  code(Vectors<8>::f32{});
}
#endif
template <class F>
__attribute__((noinline)) void with_any(const F& code) {
  code(Vectors<4>::f32{});
}

// Runs code, an APART_CODE { … }, as a function of its own, for code that has chosen its vectors V: g++ compiles it
// once for all that call it, where it compiles INLINE functions again for each.
template <class V, class F>
INLINE void apart(const F& code) {
#if defined(__x86_64__)
  if constexpr (kLanes<V> == 16) return with_avx512(code);
  if constexpr (kLanes<V> == 8) return with_avx2(code);
#endif
  if constexpr (kLanes<V> == 4) with_any(code);
}
#define APART_CODE [&](auto) __attribute__((always_inline))

// Runs code, a VECTOR_CODE { … }, with the vectors of this process's tier.
template <class F>
void with_vectors(const F& code) {
#if defined(__x86_64__)
  const Tier t = tier();
  if (t >= Tier::avx512) return with_avx512(code);
  if (t >= Tier::avx2) return with_avx2(code);
#endif
  with_any(code);
}

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(to));
  return to;
}

template <class V, class T>
INLINE V splat(T v) {
  return V{} + v;
}
// Lanes of x where a < b, else of y.
template <class C, class V>
INLINE V select_less(C a, C b, V x, V y) {
  return a < b ? x : y;
}
template <class V>
INLINE V max(V a, V b) {  // b where a is NaN
  return a > b ? a : b;
}
template <class V>
INLINE V min(V a, V b) {
  return a < b ? a : b;
}
template <class V>
INLINE V abs(V v) {
  return bits<V>(bits<Ints<V>>(v) & 0x7fffffff);
}
template <class V>
INLINE V fma_of_lanes(V a, V b, V c) {  // one rounding, as the formulas say; contraction is off
  V r;
  for (int i = 0; i < kLanes<V>; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
// Plain x86-64 has no fma, and calls a function for each lane: inlined, those calls were most of the code for four
// lanes. So code for other tiers, which has the instruction, must not use fma with four lanes.
inline __attribute__((noinline)) Vectors<4>::f32 fma_by_calls(Vectors<4>::f32 a, Vectors<4>::f32 b, Vectors<4>::f32 c) {
  return fma_of_lanes(a, b, c);
}
template <class V>
INLINE V fma(V a, V b, V c) {
#if defined(__x86_64__)
  if constexpr (kLanes<V> == 4) return fma_by_calls(a, b, c);
#endif
  return fma_of_lanes(a, b, c);
}
constexpr auto kAdd = [](auto a, auto b) __attribute__((always_inline)) { return a + b; };
constexpr auto kMax = [](auto a, auto b) __attribute__((always_inline)) { return max(a, b); };
// Four lanes: every fourth of v's, reduced by f in a tree.
template <class V, class F>
INLINE auto fours(V v, F f) {
  if constexpr (kLanes<V> == 16) {
    return fours(f(__builtin_shufflevector(v, v, 0, 1, 2, 3, 4, 5, 6, 7),
                   __builtin_shufflevector(v, v, 8, 9, 10, 11, 12, 13, 14, 15)),
                 f);
  } else if constexpr (kLanes<V> == 8) {
    return f(__builtin_shufflevector(v, v, 0, 1, 2, 3), __builtin_shufflevector(v, v, 4, 5, 6, 7));
  } else {
    return v;
  }
}
// All lanes.
template <class V, class F>
INLINE auto reduce(V v, F f) {
  auto x = fours(v, f);
  x = f(x, __builtin_shufflevector(x, x, 2, 3, 0, 1));
  return f(x, __builtin_shufflevector(x, x, 1, 0, 3, 2))[0];
}
template <class V>
INLINE auto sum(V v) {
  return reduce(v, kAdd);
}
template <class V>
INLINE auto largest(V v) {
  return reduce(v, kMax);
}

// n elements from memory, the other lanes zero. Full vectors are one load, as n is known where it is inlined.
template <class V, class T>
INLINE V load_bits(const T* p, int n) {
  static_assert(sizeof(V) == kLanes<V> * sizeof(T));
  V v{};
  if (n == kLanes<V>) {
    std::memcpy(&v, p, sizeof(v));
  } else {
    std::memcpy(&v, p, n * sizeof(T));
  }
  return v;
}
template <class V, class T>
INLINE void store_bits(V v, T* p, int n) {
  static_assert(sizeof(V) == kLanes<V> * sizeof(T));
  if (n == kLanes<V>) {
    std::memcpy(p, &v, sizeof(v));
  } else {
    std::memcpy(p, &v, n * sizeof(T));
  }
}

// int32 to 8 bits, what is above cut off, and back. Of eight lanes g++ converts one after the other, as AVX2 has no
// vectors of eight bytes: quantisation took 0.54 ns an element, now 0.2.
template <class Q, class I>
INLINE Q narrow(I v) {
  if constexpr (sizeof(Q) == 8) {
    using Sixteen = Vectors<16>::u8;
    const auto halves = bits<Sixteen>(__builtin_convertvector(bits<Vectors<8>::u32>(v), Vectors<8>::u16));
    const Sixteen bytes = __builtin_shufflevector(halves, halves, 0, 2, 4, 6, 8, 10, 12, 14, 0, 2, 4, 6, 8, 10, 12, 14);
    Q q;
    std::memcpy(&q, &bytes, sizeof(q));
    return q;
  } else {
    return __builtin_convertvector(v, Q);
  }
}
// Written as assembly: g++ 12 converts 8 to 32 bits one lane after the other, of eight lanes as of sixteen.
template <class I, class Q>
INLINE I widen(Q q) {
#if defined(__x86_64__)
  if constexpr (sizeof(Q) > 4) {
    I v;
    if constexpr (std::is_signed_v<std::remove_reference_t<decltype(q[0])>>) {
      asm("vpmovsxbd %1, %0" : "=v"(v) : "vm"(q));
    } else {
      asm("vpmovzxbd %1, %0" : "=v"(v) : "vm"(q));
    }
    return v;
  }
#endif
  return __builtin_convertvector(q, I);
}

template <class V>
INLINE V half_to_float(Halves<V> h) {  // exact; a multiplication re-biases the exponent and takes care of denormals
#if defined(__x86_64__)
  if constexpr (kLanes<V> >= 8) {
    V v;
    asm("vcvtph2ps %1, %0" : "=v"(v) : "v"(h));
    return v;
  }
#endif
  using U = Uints<V>;
  const U w = __builtin_convertvector(h, U), a = w & 0x7fff, sign = (w & 0x8000) << 16;
  const U finite = bits<U>(bits<V>(a << 13) * 0x1p112f), special = (a << 13) | 0x7f800000;
  return bits<V>(select_less(a, splat<U>(0x7c00), finite, special) | sign);
}
template <class V>
INLINE Halves<V> float_to_half(V v) {  // round to nearest even, overflow to infinity, NaN stays NaN
  using U = Uints<V>;
  const U b = bits<U>(v), a = b & 0x7fffffff, sign = (b >> 16) & 0x8000;
  const U normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  const U subnormal = bits<U>(bits<V>(a) + 0.5f) - bits<uint32_t>(0.5f);  // the step is 2^-24: fp32 rounds to it
  U h = select_less(a, splat<U>(113u << 23), subnormal, normal);
  h = select_less(a, splat<U>(0x477ff000u), h, splat<U>(0x7c00));  // from 65520
  h = select_less(splat<U>(0x7f800000u), a, splat<U>(0x7e00), h);
  return __builtin_convertvector(h | sign, Halves<V>);
}
template <class V>
INLINE Halves<V> float_to_bfloat(V v) {
  using U = Uints<V>;
  const U b = bits<U>(v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, nan = (b >> 16) | 0x40;
  return __builtin_convertvector(select_less(splat<U>(0x7f800000u), b & 0x7fffffff, nan, rounded), Halves<V>);
}

template <class V>
INLINE V e4m3_to_float(Bytes<V> v) {  // exact; the multiplication re-biases the exponent and takes care of denormals
#if defined(__x86_64__)
  // By way of fp16, of which it has the first bits but for one of the exponent: half as many instructions.
  if constexpr (kLanes<V> > 4) {
    Halves<V> w;
    asm("vpmovsxbw %1, %0" : "=v"(w) : "vm"(v));
    const Halves<V> nan = ((w & 0x7f) == 0x7f) & 0x7e00, half = ((w << 7) & 0xbfff) | nan;
    V f;
    asm("vcvtph2ps %1, %0" : "=v"(f) : "v"(half));
    return f * 0x1p8f;
  }
#endif
  using U = Uints<V>;
  const U w = widen<U>(v), a = w & 0x7f;
  const U finite = bits<U>(bits<V>(a << 20) * 0x1p120f);
  return bits<V>(select_less(a, splat<U>(0x7f), finite, splat<U>(0x7fc00000)) | (w & 0x80) << 24);
}

// 0, 1, 2, ...
template <class V>
INLINE Ints<V> lane_numbers() {
  Ints<V> numbers;
  for (int i = 0; i < kLanes<V>; ++i) numbers[i] = i;
  return numbers;
}
// The first n lanes, the others zero.
template <class V>
INLINE V first_lanes(V v, int n) {
  return n == kLanes<V> ? v : select_less(lane_numbers<V>(), splat<Ints<V>>(n), v, V{});
}

// Lanes of v whose numbers are from low to high, the others `other`. With one comparison: g++ 12 joins two,
// and made code for one lane after the other of them, with AVX-512 half of attention_decode's softmax.
template <class V>
INLINE V between(Ints<V> numbers, int low, int high, V v, float other) {
  const uint32_t count = high < low ? 0 : high - low + 1;
  return select_less(bits<Uints<V>>(numbers - low), splat<Uints<V>>(count), v, splat<V>(other));
}

template <class V, Dtype D>
INLINE V load(const void* row, int64_t column, int n = kLanes<V>) {
  if constexpr (D == Dtype::f32) return load_bits<V>(static_cast<const float*>(row) + column, n);
  if constexpr (D == Dtype::i32)
    return __builtin_convertvector(load_bits<Ints<V>>(static_cast<const int32_t*>(row) + column, n), V);
  if constexpr (D == Dtype::i8)
    return __builtin_convertvector(widen<Ints<V>>(load_bits<Chars<V>>(static_cast<const int8_t*>(row) + column, n)), V);
  if constexpr (D == Dtype::e4m3)
    return e4m3_to_float<V>(load_bits<Bytes<V>>(static_cast<const uint8_t*>(row) + column, n));
  if constexpr (D == Dtype::f16)
    return half_to_float<V>(load_bits<Halves<V>>(static_cast<const uint16_t*>(row) + column, n));
  if constexpr (D == Dtype::bf16)
    return bits<V>(
        __builtin_convertvector(load_bits<Halves<V>>(static_cast<const uint16_t*>(row) + column, n), Uints<V>) << 16);
}

template <Dtype D, class V>
INLINE void store(V v, void* row, int64_t column, int n = kLanes<V>) {
  if constexpr (D == Dtype::f32) store_bits(v, static_cast<float*>(row) + column, n);
  if constexpr (D == Dtype::f16) store_bits(float_to_half(v), static_cast<uint16_t*>(row) + column, n);
  if constexpr (D == Dtype::bf16) store_bits(float_to_bfloat(v), static_cast<uint16_t*>(row) + column, n);
}

// fp32 -> e4m3 (1, 4, 3; bias 7; 448 largest; no infinity), round to nearest even, saturating; NaN stays NaN.
template <class V>
INLINE Bytes<V> to_e4m3(V v) {
  using U = Uints<V>;
  const U b = bits<U>(v), sign = (b >> 24) & 0x80, a = b & 0x7fffffff;
  // normal, from 2^-6: round the mantissa to 3 bits, re-bias 127 -> 7; below, the step is 2^-9: adding 2^14 rounds to
  // it in fp32
  const U normal = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3);
  const U subnormal = bits<U>(bits<V>(a) + 0x1p14f) - bits<uint32_t>(0x1p14f);
  U q = min(select_less(a, splat<U>(bits<uint32_t>(0x1p-6f)), subnormal, normal), splat<U>(0x7e));
  q = select_less(splat<U>(0x7f800000u), a, splat<U>(0x7f), q);
  return narrow<Bytes<V>>(sign | q);
}

// Integers in [low, high], ties to even: in [-2^22, 2^22], adding 1.5 * 2^23 leaves the integer in the low bits. NaN
// gives low.
template <class V>
INLINE Ints<V> to_int(V v, float low, float high) {
  return bits<Ints<V>>(min(max(v, splat<V>(low)), splat<V>(high)) + 0x1.8p23f) - bits<int32_t>(0x1.8p23f);
}

// Calls f, which must be INLINE, with the dtype as a constant. (The dispatch of device/dispatch.h would not be compiled
// with the clone that calls it.) It belongs outside of loops: around a single load of the bias in the epilogue's loop,
// g++ did not move the switch out, and the epilogue took 1.7 times as long.
template <class F>
INLINE void with_float_dtype(Dtype dtype, F f) {
  switch (dtype) {
    case Dtype::f32:
      return f(std::integral_constant<Dtype, Dtype::f32>{});
    case Dtype::f16:
      return f(std::integral_constant<Dtype, Dtype::f16>{});
    default:
      return f(std::integral_constant<Dtype, Dtype::bf16>{});
  }
}

// Calls f(column, n) for every vector of [begin, end). n is constant, except for a shorter rest at the end.
template <class V, class F>
INLINE void for_each_vector(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + kLanes<V> <= end; c += kLanes<V>) f(c, kLanes<V>);
  if (c < end) f(c, static_cast<int>(end - c));
}
#define VECTOR_BODY(captures) [captures](int64_t c, int n) __attribute__((always_inline))

// A row of float32, float16 or bfloat16 to one of float32, and back.
template <class V>
INLINE void to_floats(const void* from, Dtype dtype, int64_t columns, float* to) {
  with_float_dtype(dtype, [&](auto d) __attribute__((always_inline)) {
    for_each_vector<V>(
        0, columns, VECTOR_BODY(&) { store<Dtype::f32>(load<V, decltype(d)::value>(from, c, n), to, c, n); });
  });
}

template <class V>
INLINE void from_floats(const float* from, Dtype dtype, int64_t columns, void* to) {
  with_float_dtype(dtype, [&](auto d) __attribute__((always_inline)) {
    for_each_vector<V>(
        0, columns, VECTOR_BODY(&) { store<decltype(d)::value>(load<V, Dtype::f32>(from, c, n), to, c, n); });
  });
}

// The least number of rows per thread: 16 K elements take about 5 us, as long as waking the other threads.
INLINE int64_t grain(int64_t columns) { return columns < 16384 ? 16384 / (columns > 0 ? columns : 1) : 1; }

}  // namespace forwardpass::cpu
