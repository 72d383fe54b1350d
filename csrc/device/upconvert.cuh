#pragma once
// Exact conversion of 8-bit elements to 16-bit floats, four at a time, for w8a16_gemm and the GEMVs. There is no cvt
// for it: none from e4m3 before sm_89, and none from int8 that makes more than one element. Instructions for four
// elements (sm_80): int8 to fp16 5, to bf16 8; e4m3 to fp16 12, to bf16 18; on sm_89 3 and 9.
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "device/ptx_sm80.cuh"
#include "params/common.h"

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
  // Exponent and mantissa, shifted to fp16's position, are 2^-8 times the number, subnormal ones included; a
  // multiplication by 2^8 corrects it. The last bit goes to a byte of its own, the other bits follow the sign and a bit
  // that is 0 for any number. Only NaN has all ones: adding one carries into that bit, and all ones behind it are
  // fp16's NaN.
  const uint32_t low = four << 7 & 0x80808080, upper = four >> 1 & 0x3f3f3f3f, nan = upper + (four & 0x01010101),
                 high = (nan & 0x40404040) | upper | (four & 0x80808080);
  const __half2 scale{__ushort_as_half(0x5c00), __ushort_as_half(0x5c00)};
  pairs[0] = bits_of(__hmul2(pair_of<__half2>(__byte_perm(low, high, 0x5140)), scale));
  pairs[1] = bits_of(__hmul2(pair_of<__half2>(__byte_perm(low, high, 0x7362)), scale));
#endif
}

// Two bytes that hold the elements plus 128, each placed below a byte 0x64: as fp16 that is 1024 plus the byte, 1152
// more than the element. (The constant is the first operand of prmt, as the instruction takes one constant behind it:
// with two, ptxas copies Order to a register each time, 327 instead of 295 instructions in wgmma_upconverting.cuh.)
template <uint32_t Order>
__device__ inline uint32_t biased_to_f16(uint32_t bytes, uint32_t bias) {
  const __half2 offset{__ushort_as_half(0x6480), __ushort_as_half(0x6480)};
  return bits_of(__hsub2(pair_of<__half2>(__byte_perm(0x64646464, bytes, Order) ^ bias), offset));
}
// bf16 has only 7 mantissa bits: below 0x43 the lower 7 bits make 128 plus them; 128 is subtracted or, if the sign is
// set, 256.
template <uint32_t Order>
__device__ inline uint32_t i8_to_bf16(uint32_t bytes) {
  const uint32_t v = __byte_perm(0x43434343, bytes, Order);
  return bits_of(__hsub2(pair_of<__nv_bfloat162>(v & 0xff7fff7f), pair_of<__nv_bfloat162>(v & 0xff80ff80)));
}
__device__ inline uint32_t f16_to_bf16(uint32_t pair) {
  return bits_of(__float22bfloat162_rn(__half22float2(pair_of<__half2>(pair))));
}

// Four elements of From, the lowest byte first, to two pairs of To.
template <Dtype From, Dtype To>
__device__ inline void upconvert(uint32_t four, uint32_t (&pairs)[2]) {
  static_assert((From == Dtype::i8 || From == Dtype::e4m3) && (To == Dtype::f16 || To == Dtype::bf16));
  if constexpr (From == Dtype::i8 && To == Dtype::f16) {
    const uint32_t biased = four ^ 0x80808080;
    pairs[0] = biased_to_f16<0x0504>(biased, 0), pairs[1] = biased_to_f16<0x0706>(biased, 0);
  } else if constexpr (From == Dtype::i8) {
    pairs[0] = i8_to_bf16<0x0504>(four), pairs[1] = i8_to_bf16<0x0706>(four);
  } else {
    e4m3_to_f16(four, pairs);
    if constexpr (To == Dtype::bf16) pairs[0] = f16_to_bf16(pairs[0]), pairs[1] = f16_to_bf16(pairs[1]);
  }
}
// Two elements in the low half of a word: half as many instructions, except int8 to fp16, which takes a third one per
// pair.
template <Dtype From, Dtype To>
__device__ inline uint32_t upconvert(uint32_t two) {
  if constexpr (From == Dtype::i8) {
    return To == Dtype::f16 ? biased_to_f16<0x0504>(two, 0x00800080) : i8_to_bf16<0x0504>(two);
  } else {
    uint32_t pairs[2];
    e4m3_to_f16(two, pairs);
    return To == Dtype::f16 ? pairs[0] : f16_to_bf16(pairs[0]);
  }
}

// Four elements of a row and of the row eight below: 16 of K of an mma's first operand.
template <Dtype From, Dtype To>
__device__ inline void upconvert_rows(uint32_t four, uint32_t below, uint32_t (&fragment)[4]) {
  uint32_t pairs[2];
  upconvert<From, To>(four, pairs);
  fragment[0] = pairs[0], fragment[2] = pairs[1];
  upconvert<From, To>(below, pairs);
  fragment[1] = pairs[0], fragment[3] = pairs[1];
}

// Word i of 16 bytes.
__device__ inline uint32_t word(const uint4& v, int i) { return i == 0 ? v.x : i == 1 ? v.y : i == 2 ? v.z : v.w; }

}  // namespace forwardpass
