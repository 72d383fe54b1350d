#pragma once
// The rotation of a row before it is quantised, by tensor cores. A warp has 256 columns as a 16 x 16 matrix X; H of 256
// is a Kronecker product, so they become A X B, of two 16 x 16 matrices of +-1/4. Both products have the constant as
// their first operand: the accumulators of the first are the second operand of the next as they lie, and those of the
// next lie where the columns were. No shuffle and no shared memory: of 8 values a lane 8 mma and 16 fma, where a fast
// transform would take 40 shuffles and 72 additions.
//
// tf32 and not fp16: values have any magnitude (a gated activation's exceed 65504), and what comes as fp16 or bf16 is
// exact. What is multiplied has 11 bits, an error of at most 2^-10 of a value's share, where int8 has steps of 2^-7 of
// the largest.
#include "device/fragments.cuh"
#include "device/vec.cuh"

namespace forwardpass {

// Which 8 of a warp's 256 columns a lane has. An index of columns is eight bits, of which a lane's vector has the first
// three; lane bits 2 to 4 are bits 3 to 5, lane bits 0 and 1 are bits 6 and 7. Then bits 0, 1, 6, 7 are the rows of X
// and bits 2 to 5 its columns, and no factor of H, of two bits each, is in both.
__device__ inline int rotated_lane(int lane) { return (lane & ~31) | (lane >> 2 & 7) | (lane & 3) << 3; }

class Rotation {
 public:
  // H of 64, 128 or 256 columns; of 64 and 128 a warp has several.
  __device__ explicit Rotation(int columns) : columns_(columns) {
    const int g = group_id(), t = thread_in_group();
    const bool far = (g >> 1 & 1) != (t & 1), farther = (g >> 2 & 1) != (t >> 1);
    fill(b_, far && farther ? -0.25f : 0.25f);
    // Of A's factor of bits 6 and 7 of the columns' index 256 columns have all, 128 bit 6, and 64 none.
    if (columns == 256)
      fill(a_, far && farther ? -0.25f : 0.25f);
    else if (columns == 128)
      fill(a_, farther ? 0 : g >> 1 & t & 1 ? -0.25f : 0.25f);
    else
      fill(a_, far || farther ? 0 : 0.5f);
  }
  // By which what is left here is to be multiplied: that of 128 is no power of two.
  __device__ float factor() const { return columns_ == 128 ? 1.41421356f : 1; }

  // By all lanes of a warp, which have the columns that rotated_lane says.
  __device__ void operator()(float (&v)[kVec]) const {
    float sums[2][4];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      multiply(sums[half], a_, [&](int k, int i) { return v[half * 4 + k * 2 + i]; });
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float rotated[4];
      multiply(rotated, b_, [&](int k, int i) { return sums[k][half * 2 + i]; });
#pragma unroll
      for (int i = 0; i < 4; ++i) v[i / 2 * 4 + half * 2 + i % 2] = rotated[i];
    }
  }

 private:
  // mma's first operand, of which a lane has two rows and two columns of each eight: a lane's factor of two bits of the
  // row and of the column is the same in all, and the other two bits say which of the registers it is.
  __device__ static void fill(uint32_t (&a)[2][4], float factor) {
    const float other = group_id() % 2 ? -factor : factor;
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i / 4][i % 4] = __float_as_uint(i % 2 == i / 4 ? factor : i / 2 % 2 ? -other : other);
  }

  // tf32 as the tensor cores cut it off: 2^-11.5 of the value more is as often too much as too little. cvt.rna takes
  // eight times as long, and an integer added would lose NaN.
  __device__ static uint32_t to_tf32(float v) { return __float_as_uint(__fmaf_rn(v, 3.4526698e-4f, v)); }

  template <class Value>
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[2][4], Value value) {
    constexpr float kZeros[4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t b[2] = {to_tf32(value(k, 0)), to_tf32(value(k, 1))};
      if (k == 0)
        ptx::mma_m16n8k8(d, a[k], b, kZeros);
      else
        ptx::mma_m16n8k8(d, a[k], b, d);
    }
  }

  int columns_;
  uint32_t a_[2][4], b_[2][4];
};

}  // namespace forwardpass
