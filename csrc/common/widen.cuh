#pragma once
// 8-bit numbers to 16-bit floats, exactly, four at a time: what w8a16_gemm and the GEMVs do in place of a cvt, of which
// there is none from e4m3 before sm_89, and none from int8 that makes more than one number. Instructions for four
// (sm_80): int8 to fp16 5, to bf16 8; e4m3 to fp16 12, to bf16 18; on sm_89 3 and 9.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "common/params.h"
#include "common/ptx_sm80.cuh"

namespace forwardpass {

template <class Pair>
__device__ inline uint32_t bits_of(Pair v) {
  static_assert(sizeof v == 4);
  return *reinterpret_cast<uint32_t*>(&v);
}
template <class Pair>
__device__ inline Pair pair_of(uint32_t bits) {
  return *reinterpret_cast<Pair*>(&bits);
}

// Four e4m3, the lowest byte first, to two pairs of fp16.
__device__ inline void e4m3_to_f16(uint32_t four, uint32_t (&pairs)[2]) {
#if __CUDA_ARCH__ >= 890
  pairs[0] = ptx::cvt_f16x2(static_cast<uint16_t>(four));
  pairs[1] = ptx::cvt_f16x2(static_cast<uint16_t>(four >> 16));
#else
  // Exponent and mantissa, moved to where fp16 has them, are 2^-8 of the number, subnormal ones too: the last bit is
  // the first of a byte of its own, the others follow the sign and a bit that no number has. NaN alone is all ones, so
  // one more carries into that bit, and all ones behind it are fp16's NaN.
  const uint32_t low = four << 7 & 0x80808080, most = four >> 1 & 0x3f3f3f3f, nan = most + (four & 0x01010101),
                 high = (nan & 0x40404040) | most | (four & 0x80808080);
  const __half2 scale{__ushort_as_half(0x5c00), __ushort_as_half(0x5c00)};
  pairs[0] = bits_of(__hmul2(pair_of<__half2>(__byte_perm(low, high, 0x5140)), scale));
  pairs[1] = bits_of(__hmul2(pair_of<__half2>(__byte_perm(low, high, 0x7362)), scale));
#endif
}

// Four of From, the lowest byte first, to two pairs of To.
template <Dtype From, Dtype To>
__device__ inline void widen(uint32_t four, uint32_t (&pairs)[2]) {
  static_assert((From == Dtype::i8 || From == Dtype::e4m3) && (To == Dtype::f16 || To == Dtype::bf16));
  if constexpr (From == Dtype::i8 && To == Dtype::f16) {
    // 128 more is not negative, and in the low bits of 1024 it is 1024 more: 1152 too many
    const uint32_t shifted = four ^ 0x80808080;
    const __half2 offset{__ushort_as_half(0x6480), __ushort_as_half(0x6480)};
    pairs[0] = bits_of(__hsub2(pair_of<__half2>(__byte_perm(shifted, 0x64646464, 0x4140)), offset));
    pairs[1] = bits_of(__hsub2(pair_of<__half2>(__byte_perm(shifted, 0x64646464, 0x4342)), offset));
  } else if constexpr (From == Dtype::i8) {
    // bf16 has 7 bits for a number: behind 128 the lower 7, from which comes off 128 or, where the sign is set, 256
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t bytes = __byte_perm(four, 0x43434343, i == 0 ? 0x4140 : 0x4342);
      pairs[i] =
          bits_of(__hsub2(pair_of<__nv_bfloat162>(bytes & 0xff7fff7f), pair_of<__nv_bfloat162>(bytes & 0xff80ff80)));
    }
  } else {
    e4m3_to_f16(four, pairs);
    if constexpr (To == Dtype::bf16) {
#pragma unroll
      for (int i = 0; i < 2; ++i) pairs[i] = bits_of(__float22bfloat162_rn(__half22float2(pair_of<__half2>(pairs[i]))));
    }
  }
}

// Four of a row and four of the row eight below: an mma's first operand, 16 of its K.
template <Dtype From, Dtype To>
__device__ inline void widen_rows(uint32_t four, uint32_t below, uint32_t (&fragment)[4]) {
  uint32_t pairs[2];
  widen<From, To>(four, pairs);
  fragment[0] = pairs[0], fragment[2] = pairs[1];
  widen<From, To>(below, pairs);
  fragment[1] = pairs[0], fragment[3] = pairs[1];
}

// Word i of 16 bytes.
__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

}  // namespace forwardpass
