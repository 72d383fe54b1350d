#pragma once
// The rotation of a row before it is quantised, by tensor cores. A warp has 256 columns as a 16 x 16 matrix X; H of 256
// is a Kronecker product, so they become A X B, of two 16 x 16 matrices of +-1/4. Both products have the constant as
// their first operand: the accumulators of the first are the second operand of the next as they lie, and those of the
// next lie where the columns were. No shuffle and no shared memory; of 256 values 8 mma and 16 conversions a lane, two
// instructions a value where a fast transform would take five shuffles and nine additions.
//
// tf32 and not fp16: values have any magnitude (a gated activation's exceed 65504), and what comes as fp16 or bf16 is
// exact. Sums are rounded to 11 bits between the products, an error of at most 2^-11 of a value's share, where int8 has
// steps of 2^-7 of the largest.
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
  __device__ explicit Rotation(int columns) : root_(columns == 128 ? 1.41421356f : 1) {
#pragma unroll
    for (int i = 0; i < 8; ++i) {  // the registers of mma's first operand: two rows, and two columns of each eight
      const int row = group_id() + i % 2 * 8, column = thread_in_group() + i / 2 % 2 * 4 + i / 4 * 8;
      // of A, rows: bits 0, 6, 7, 1 of the columns' index; columns: bits 6, 7, 0, 1
      const bool low = bit(row, 0) != bit(column, 2) && bit(row, 3) != bit(column, 3);
      bool high = bit(row, 1) != bit(column, 0) && bit(row, 2) != bit(column, 1), zero = false;
      if (columns < 256) {
        zero = bit(row, 2) != bit(column, 1) || (columns == 64 && bit(row, 1) != bit(column, 0));
        high = columns == 128 && bit(row, 1) && bit(column, 0);
      }
      const float size = columns == 64 ? 0.5f : 0.25f;
      a_[i / 4][i % 4] = __float_as_uint(zero ? 0 : low != high ? -size : size);
      // of B, rows: bits 3, 4, 5, 2; columns: bits 4, 5, 3, 2
      const bool first = bit(row, 3) != bit(column, 3) && bit(row, 0) != bit(column, 2);
      const bool second = bit(row, 1) != bit(column, 0) && bit(row, 2) != bit(column, 1);
      b_[i / 4][i % 4] = __float_as_uint(first != second ? -0.25f : 0.25f);
    }
  }

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
      for (int i = 0; i < 4; ++i) v[i / 2 * 4 + half * 2 + i % 2] = __fmul_rn(rotated[i], root_);
    }
  }

 private:
  __device__ static bool bit(int n, int i) { return n >> i & 1; }

  template <class Value>
  __device__ static void multiply(float (&d)[4], const uint32_t (&a)[2][4], Value value) {
    constexpr float kZeros[4] = {};
#pragma unroll
    for (int k = 0; k < 2; ++k) {
      const uint32_t b[2] = {ptx::cvt_tf32(value(k, 0)), ptx::cvt_tf32(value(k, 1))};
      if (k == 0)
        ptx::mma_m16n8k8(d, a[k], b, kZeros);
      else
        ptx::mma_m16n8k8(d, a[k], b, d);
    }
  }

  uint32_t a_[2][4], b_[2][4];
  float root_;
};

}  // namespace forwardpass
