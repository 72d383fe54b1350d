#pragma once
// A softmax whose scores come a block of keys at a time, on the fragments that mma and wgmma leave: a thread has, of
// each of a warp's blocks of sixteen rows, row lane / 4 (elements 0 and 1 of an n8 tile) and the one eight below
// (elements 2 and 3), and of either two neighbouring columns a tile.
#include "device/widen.cuh"

namespace forwardpass {

// One value for each row that a thread has.
template <int kRows>
using RowValues = float[kRows][2];

// Two of them, rounded: a pair of what an mma takes as a, in which fragments lie as they come.
template <Dtype D>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (D == Dtype::f16)
    return bits_of(__floats2half2_rn(low, high));
  else
    return bits_of(__floats2bfloat162_rn(low, high));
}

// Two n8 tiles of fragments, as they lie in registers: the a of an mma, sixteen of its columns.
template <Dtype D, int kTiles>
__device__ inline void pack_operand(uint32_t (&a)[4], const float (&p)[kTiles][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto& tile = p[step * 2 + i / 2];
    a[i] = pack<D>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
  }
}

template <int kRows, int kTiles>
__device__ inline void rescale(float (&o)[kRows][kTiles][4], const RowValues<kRows>& factor) {
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int t = 0; t < kTiles; ++t)
#pragma unroll
      for (int e = 0; e < 4; ++e) o[r][t][e] *= factor[r][e / 2];
}

template <int kRows>
struct OnlineSoftmax {
  RowValues<kRows> max, sum;  // in units of log2(e), 2^-max times; each thread's share of sum, of its own columns

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < 2 * kRows; ++r) max[r / 2][r % 2] = -INFINITY, sum[r / 2][r % 2] = 0;
  }
  // Scores, times `scale` in units of log2(e), to 2^(score - max). What was accumulated has to be multiplied by
  // `factor`; false: by 1, for all rows of the warp.
  template <int kTiles>
  __device__ bool update(float (&s)[kRows][kTiles][4], float scale, RowValues<kRows>& factor) {
    bool grown = false;
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float most = fmaxf(s[r][0][half * 2], s[r][0][half * 2 + 1]);
#pragma unroll
        for (int t = 1; t < kTiles; ++t) most = fmaxf(most, fmaxf(s[r][t][half * 2], s[r][t][half * 2 + 1]));
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 1));
        most = fmaxf(most, __shfl_xor_sync(0xffffffff, most, 2)) * scale;
        const float before = max[r][half], now = fmaxf(before, most);
        grown |= now > before;
        max[r][half] = now;
        // Of a row whose scores are all -inf as yet no difference is taken: 2^(-inf - 0) is the 0 that it should be.
        const float base = now == -INFINITY ? 0 : now;
        factor[r][half] = ptx::ex2(before - base);
        float add;  // from the first one on: 0 plus it would be an instruction too
#pragma unroll
        for (int t = 0; t < kTiles; ++t)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[r][t][e] = ptx::ex2(fmaf(s[r][t][e], scale, -base));
            add = t == 0 && e == half * 2 ? s[r][t][e] : add + s[r][t][e];
          }
        sum[r][half] = fmaf(sum[r][half], factor[r][half], add);
      }
    return __any_sync(0xffffffff, grown);
  }
  // All keys have been seen: `factor` is what the accumulated sums of values are to be multiplied by, `lse` the natural
  // logarithm of the denominator. sink: one more score, in units of log2(e). A row without keys has a factor of 0.
  __device__ void finish(float sink, RowValues<kRows>& factor, RowValues<kRows>& lse) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float total = sum[r][half];
        total += __shfl_xor_sync(0xffffffff, total, 1);
        total += __shfl_xor_sync(0xffffffff, total, 2);
        const float most = fmaxf(max[r][half], sink), base = most == -INFINITY ? 0 : most,
                    keys = ptx::ex2(max[r][half] - base), all = fmaf(total, keys, ptx::ex2(sink - base));
        factor[r][half] = all == 0 ? 0 : __fdividef(keys, all);
        lse[r][half] = (base + log2f(all)) * 0.693147181f;
      }
  }
};

}  // namespace forwardpass
