#pragma once
// What the CPU kernels share. They are plain loops that g++ vectorises, compiled three times by target_clones (AVX-512, AVX2,
// baseline) and chosen at load time; everything that a cloned function calls must be INLINE to be compiled with it.
#include <cmath>
#include <cstdint>
#include <cstring>

#include "common/params.h"

#if defined(__x86_64__)
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE inline __attribute__((always_inline))

namespace forwardpass::cpu {

struct bf16 {
  uint16_t bits;
};
using f16 = _Float16;
struct e4m3 {
  uint8_t bits;
};

template <Dtype D>
struct Type;
template <>
struct Type<Dtype::f32> {
  using type = float;
};
template <>
struct Type<Dtype::f16> {
  using type = f16;
};
template <>
struct Type<Dtype::bf16> {
  using type = bf16;
};

template <class To, class From>
INLINE To bits(From v) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &v, sizeof(to));
  return to;
}

INLINE float to_float(float v) { return v; }
INLINE float to_float(f16 v) { return static_cast<float>(v); }
INLINE float to_float(bf16 v) { return bits<float>(static_cast<uint32_t>(v.bits) << 16); }

INLINE void from_float(float v, float& to) { to = v; }
INLINE void from_float(float v, f16& to) { to = static_cast<f16>(v); }
INLINE void from_float(float v, bf16& to) {  // round to nearest even; a NaN keeps its sign and becomes quiet
  const uint32_t b = bits<uint32_t>(v), rounded = (b + 0x7fff + ((b >> 16) & 1)) >> 16, nan = (b >> 16) | 0x40;
  to.bits = static_cast<uint16_t>((b & 0x7fffffff) > 0x7f800000 ? nan : rounded);
}

// fp32 -> e4m3 (1, 4, 3; bias 7; 448 largest; no infinity), round to nearest even, saturating; NaN stays NaN.
INLINE uint8_t to_e4m3(float v) {
  const uint32_t b = bits<uint32_t>(v), sign = (b >> 24) & 0x80, a = b & 0x7fffffff;
  // normal, from 2^-6: round the mantissa to 3 bits, re-bias 127 -> 7; below, the step is 2^-9: adding 2^14 rounds to it in fp32
  const uint32_t normal = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = bits<uint32_t>(bits<float>(a) + 0x1p14f) - bits<uint32_t>(0x1p14f);
  uint32_t q = a < bits<uint32_t>(0x1p-6f) ? subnormal : normal;
  q = q > 0x7e ? 0x7e : q;
  q = a > 0x7f800000 ? 0x7f : q;
  return static_cast<uint8_t>(sign | q);
}

// Rounds to an integer in [low, high], ties to even, in the order that keeps everything a vector operation; NaN gives low.
INLINE int32_t to_int(float v, float low, float high) {
  v = v > low ? v : low;
  v = v < high ? v : high;
  return static_cast<int32_t>(__builtin_nearbyintf(v));
}

// Rows a thread takes at least: 16 K elements take some 5 us, as long as waking the other threads.
INLINE int64_t grain(int64_t columns) { return columns < 16384 ? 16384 / (columns > 0 ? columns : 1) : 1; }

}  // namespace forwardpass::cpu
