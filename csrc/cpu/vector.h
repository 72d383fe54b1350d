#pragma once
// What the CPU kernels share: 16 fp32 lanes as a g++ vector type. A kernel's outer function is marked CLONES: it is
// compiled three times (AVX-512: one register; AVX2: two; baseline: four) and one is chosen at load time; all functions
// that it calls must be INLINE to be compiled with it. Loops left to the auto-vectoriser were tried first: it gave up
// on most of them, at 3.4 ns an element.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "params/common.h"

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace forwardpass::cpu {

constexpr int kLanes = 16;
using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using i8x16 = int8_t __attribute__((vector_size(16)));
using u8x16 = uint8_t __attribute__((vector_size(16)));

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(to));
  return to;
}

INLINE f32x16 splat(float v) { return f32x16{} + v; }
INLINE f32x16 abs(f32x16 v) { return bits<f32x16>(bits<i32x16>(v) & 0x7fffffff); }
INLINE f32x16 max(f32x16 a, f32x16 b) { return a > b ? a : b; }  // b where a is NaN
INLINE f32x16 min(f32x16 a, f32x16 b) { return a < b ? a : b; }
INLINE u32x16 max(u32x16 a, u32x16 b) { return a > b ? a : b; }
INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {  // one rounding, as the formulas say; contraction is off
  f32x16 r;
  for (int i = 0; i < kLanes; ++i) r[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return r;
}
INLINE float sum(f32x16 v) {
  float s = 0;
  for (int i = 0; i < kLanes; ++i) s += v[i];
  return s;
}
INLINE uint32_t largest(u32x16 v) {
  uint32_t m = 0;
  for (int i = 0; i < kLanes; ++i) m = m > v[i] ? m : v[i];
  return m;
}

// n of 16 elements from memory, the others zero. Full vectors are one load, as n == 16 is known where it is inlined.
template <class V, class T>
INLINE V load_bits(const T* p, int n) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  V v{};
  if (n == kLanes) {
    std::memcpy(&v, p, sizeof(v));
  } else {
    std::memcpy(&v, p, n * sizeof(T));
  }
  return v;
}
template <class V, class T>
INLINE void store_bits(V v, T* p, int n) {
  static_assert(sizeof(V) == kLanes * sizeof(T));
  if (n == kLanes) {
    std::memcpy(p, &v, sizeof(v));
  } else {
    std::memcpy(p, &v, n * sizeof(T));
  }
}

INLINE f32x16
half_to_float(u16x16 h) {  // exact; the exponent is re-biased by a multiplication, which takes care of denormals
  const u32x16 w = __builtin_convertvector(h, u32x16), a = w & 0x7fff, sign = (w & 0x8000) << 16;
  const u32x16 finite = bits<u32x16>(bits<f32x16>(a << 13) * 0x1p112f), special = (a << 13) | 0x7f800000;
  return bits<f32x16>((a >= 0x7c00 ? special : finite) | sign);
}
INLINE u16x16 float_to_half(f32x16 v) {  // round to nearest even, overflow to infinity, NaN stays NaN
  const u32x16 b = bits<u32x16>(v), a = b & 0x7fffffff, sign = (b >> 16) & 0x8000;
  const u32x16 normal = (a + 0xfff + ((a >> 13) & 1) - (112u << 23)) >> 13;
  const u32x16 subnormal =
      bits<u32x16>(bits<f32x16>(a) + 0.5f) - bits<uint32_t>(0.5f);  // the step is 2^-24: fp32 rounds to it
  u32x16 h = a < (113u << 23) ? subnormal : normal;
  h = a >= 0x477ff000 ? u32x16{} + 0x7c00 : h;  // from 65520
  h = a > 0x7f800000 ? u32x16{} + 0x7e00 : h;
  return __builtin_convertvector(h | sign, u16x16);
}
INLINE u16x16 float_to_bfloat(f32x16 v) {
  const u32x16 b = bits<u32x16>(v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, nan = (b >> 16) | 0x40;
  return __builtin_convertvector((b & 0x7fffffff) > 0x7f800000 ? nan : rounded, u16x16);
}

INLINE f32x16 e4m3_to_float(u8x16 v) {  // exact; the multiplication re-biases the exponent and takes care of denormals
  const u32x16 w = __builtin_convertvector(v, u32x16), a = w & 0x7f;
  const u32x16 finite = bits<u32x16>(bits<f32x16>(a << 20) * 0x1p120f);
  return bits<f32x16>((a == 0x7f ? u32x16{} + 0x7fc00000 : finite) | (w & 0x80) << 24);
}

// The first n lanes, the others zero.
INLINE f32x16 first_lanes(f32x16 v, int n) {
  constexpr i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return n == kLanes ? v : bits<f32x16>(bits<i32x16>(v) & (lane < n));
}

template <Dtype D>
INLINE f32x16 load(const void* row, int64_t column, int n = kLanes) {
  if constexpr (D == Dtype::f32) return load_bits<f32x16>(static_cast<const float*>(row) + column, n);
  if constexpr (D == Dtype::i32)
    return __builtin_convertvector(load_bits<i32x16>(static_cast<const int32_t*>(row) + column, n), f32x16);
  if constexpr (D == Dtype::i8)
    return __builtin_convertvector(load_bits<i8x16>(static_cast<const int8_t*>(row) + column, n), f32x16);
  if constexpr (D == Dtype::e4m3) return e4m3_to_float(load_bits<u8x16>(static_cast<const uint8_t*>(row) + column, n));
  if constexpr (D == Dtype::f16) return half_to_float(load_bits<u16x16>(static_cast<const uint16_t*>(row) + column, n));
  if constexpr (D == Dtype::bf16)
    return bits<f32x16>(
        __builtin_convertvector(load_bits<u16x16>(static_cast<const uint16_t*>(row) + column, n), u32x16) << 16);
}

template <Dtype D>
INLINE void store(f32x16 v, void* row, int64_t column, int n = kLanes) {
  if constexpr (D == Dtype::f32) store_bits(v, static_cast<float*>(row) + column, n);
  if constexpr (D == Dtype::f16) store_bits(float_to_half(v), static_cast<uint16_t*>(row) + column, n);
  if constexpr (D == Dtype::bf16) store_bits(float_to_bfloat(v), static_cast<uint16_t*>(row) + column, n);
}

// fp32 -> e4m3 (1, 4, 3; bias 7; 448 largest; no infinity), round to nearest even, saturating; NaN stays NaN.
INLINE u8x16 to_e4m3(f32x16 v) {
  const u32x16 b = bits<u32x16>(v), sign = (b >> 24) & 0x80, a = b & 0x7fffffff;
  // normal, from 2^-6: round the mantissa to 3 bits, re-bias 127 -> 7; below, the step is 2^-9: adding 2^14 rounds to
  // it in fp32
  const u32x16 normal = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3);
  const u32x16 subnormal = bits<u32x16>(bits<f32x16>(a) + 0x1p14f) - bits<uint32_t>(0x1p14f);
  u32x16 q = a < bits<uint32_t>(0x1p-6f) ? subnormal : normal;
  q = q > 0x7e ? u32x16{} + 0x7e : q;
  q = a > 0x7f800000 ? u32x16{} + 0x7f : q;
  return __builtin_convertvector(sign | q, u8x16);
}

// Integers in [low, high], ties to even: in [-2^22, 2^22], adding 1.5 * 2^23 leaves the integer in the low bits. NaN
// gives low.
INLINE i32x16 to_int(f32x16 v, float low, float high) {
  return bits<i32x16>(min(max(v, splat(low)), splat(high)) + 0x1.8p23f) - bits<int32_t>(0x1.8p23f);
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

// Calls f(column, n) for every 16 columns of [begin, end). n is the literal 16, except for a shorter rest at the end.
template <class F>
INLINE void for_each_vector(int64_t begin, int64_t end, F f) {
  int64_t c = begin;
  for (; c + kLanes <= end; c += kLanes) f(c, kLanes);
  if (c < end) f(c, static_cast<int>(end - c));
}
#define VECTOR_BODY(captures) [captures](int64_t c, int n) __attribute__((always_inline))

// The least number of rows per thread: 16 K elements take about 5 us, as long as waking the other threads.
INLINE int64_t grain(int64_t columns) { return columns < 16384 ? 16384 / (columns > 0 ? columns : 1) : 1; }

}  // namespace forwardpass::cpu
