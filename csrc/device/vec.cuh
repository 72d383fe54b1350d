#pragma once
// Eight elements at a time: 16-byte accesses where the pointer allows, element by element elsewhere and at a row's end.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/ptx_sm80.cuh"
#include "params/common.h"

namespace forwardpass {

constexpr int kVec = 8;

inline bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

template <Dtype D>
struct CudaType;
template <>
struct CudaType<Dtype::f32> {
  using type = float;
};
template <>
struct CudaType<Dtype::f16> {
  using type = __half;
};
template <>
struct CudaType<Dtype::bf16> {
  using type = __nv_bfloat16;
};
template <>
struct CudaType<Dtype::i32> {
  using type = int32_t;
};
template <Dtype D>
using cuda_t = typename CudaType<D>::type;

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(int32_t v) { return __int2float_rn(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline void from_float(float v, float& to) { to = v; }
__device__ inline void from_float(float v, __half& to) { to = __float2half_rn(v); }
__device__ inline void from_float(float v, __nv_bfloat16& to) { to = __float2bfloat16_rn(v); }

// Element i of p, of a type that is known at run time: fp32, fp16 or bf16.
__device__ inline float load_float(const void* p, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::f32:
      return static_cast<const float*>(p)[i];
    case Dtype::f16:
      return to_float(static_cast<const __half*>(p)[i]);
    default:
      return to_float(static_cast<const __nv_bfloat16*>(p)[i]);
  }
}

// Eight elements of T in registers; moved as 16-byte (or, for 1-byte T, 8-byte) words.
template <class T>
struct alignas(sizeof(T) * kVec < 16 ? sizeof(T) * kVec : 16) Vec {
  T e[kVec];
};

// n of 8 elements at p, the others zero. `aligned`: p is a multiple of alignof(Vec<T>), the same for all threads.
template <class T>
__device__ inline Vec<T> load_vec(const T* p, int n, bool aligned) {
  Vec<T> v;
  if (aligned && n >= kVec) {
    v = *reinterpret_cast<const Vec<T>*>(p);
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v.e[i] = i < n ? p[i] : T{};
  }
  return v;
}

template <class T>
__device__ inline void store_vec(const Vec<T>& v, T* p, int n, bool aligned) {
  if (aligned && n >= kVec) {
    if constexpr (sizeof(T) == 4) {  // nvcc 13.0 makes eight stores of 4 bytes of the assignment
      const auto half = reinterpret_cast<const uint4*>(&v);
      ptx::st_global(p, half[0]), ptx::st_global(p + 4, half[1]);
    } else {
      *reinterpret_cast<Vec<T>*>(p) = v;
    }
  } else {
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < n) p[i] = v.e[i];
  }
}

template <class T>
__device__ inline void load_floats(float (&f)[kVec], const T* p, int n, bool aligned) {
  const Vec<T> v = load_vec(p, n, aligned);
#pragma unroll
  for (int i = 0; i < kVec; ++i) f[i] = to_float(v.e[i]);
}

// Zeros from n on. One branch a vector: testing each element would cost every vector what only a row's last one needs.
__device__ inline void trim(float (&f)[kVec], int n) {
  if (n >= kVec) return;
#pragma unroll
  for (int i = 0; i < kVec; ++i)
    if (i >= n) f[i] = 0;
}

// Two fp32 -> two e4m3, to nearest even, saturating. Before sm_89 there is no instruction: the rounding on the bits.
__device__ inline uint8_t to_e4m3_bits(float v) {
  const uint32_t b = __float_as_uint(v), sign = (b >> 24) & 0x80, a = b & 0x7fffffff;
  // normal, from 2^-6: round the mantissa to 3 bits, re-bias 127 -> 7; below, the step is 2^-9, and adding 2^14 rounds
  // to it in fp32
  const uint32_t normal = ((a + 0x7ffff + ((a >> 20) & 1)) >> 20) - (120 << 3);
  const uint32_t subnormal = __float_as_uint(__fadd_rn(__uint_as_float(a), 0x1p14f)) - __float_as_uint(0x1p14f);
  uint32_t q = a < 0x3c800000 ? subnormal : normal;
  q = min(q, 0x7eu);
  return sign | (a > 0x7f800000 ? 0x7f : q);
}
__device__ inline uint16_t to_e4m3x2(float high, float low) {
#if __CUDA_ARCH__ >= 890
  return ptx::cvt_e4m3x2(high, low);
#else
  return to_e4m3_bits(high) << 8 | to_e4m3_bits(low);
#endif
}

__device__ inline Vec<uint8_t> to_e4m3_vector(const float (&v)[kVec], float factor) {
  Vec<uint8_t> q;
#pragma unroll
  for (int i = 0; i < kVec; i += 2) {
    const uint16_t pair = to_e4m3x2(__fmul_rn(v[i + 1], factor), __fmul_rn(v[i], factor));
    q.e[i] = pair & 0xff;
    q.e[i + 1] = pair >> 8;
  }
  return q;
}

// Integers in [low, high], ties to even: in [-2^22, 2^22], adding 1.5 * 2^23 leaves the integer in the low bits. NaN
// gives low. cvt.rni.s32.f32 saturates at 2^31 only, so with it the zero point needs clamps on both sides of its
// addition.
__device__ inline int to_int(float v, float low, float high) {
  return __float_as_int(__fadd_rn(fminf(fmaxf(v, low), high), 0x1.8p23f)) - __float_as_int(0x1.8p23f);
}

}  // namespace forwardpass
