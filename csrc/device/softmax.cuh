#pragma once
// Online softmax, over one block of keys after the other, on the fragments of mma and wgmma: of each m16 tile a thread
// has row lane / 4 (elements 0 and 1 of an n8 tile) and the row eight below (elements 2 and 3), two neighbouring
// columns per n8 tile.
#include "device/upconvert.cuh"

namespace forwardpass {

// One value per row of a thread.
template <int kRows>
using RowValues = float[kRows][2];

// Two values, rounded to D: a register of an mma's first operand.
template <Dtype D>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (D == Dtype::f16)
    return bits_of(__floats2half2_rn(low, high));
  else
    return bits_of(__floats2bfloat162_rn(low, high));
}

// Two n8 tiles of accumulators are, as they are, the first operand of an mma: sixteen of its columns.
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
  RowValues<kRows> max, sum;  // max: in units of log2(e); sum: times 2^-max, over this thread's columns only

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int r = 0; r < 2 * kRows; ++r) max[r / 2][r % 2] = -INFINITY, sum[r / 2][r % 2] = 0;
  }
  // Turns scores s, times `scale` in units of log2(e), into 2^(s - max). The output accumulators have to be multiplied
  // by `factor`. False: factor is 1 for all rows of the warp.
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
        // A row whose scores are all -inf so far has no maximum to subtract: 2^(-inf - 0) is the 0 that it should be.
        const float base = now == -INFINITY ? 0 : now;
        factor[r][half] = ptx::ex2(before - base);
        float add;  // begins with the first value: adding it to 0 would be one more instruction
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
  // After all keys: the output accumulators have to be multiplied by `factor`, and `lse` is the natural logarithm of
  // the denominator. sink: one more score, in units of log2(e). A row without keys has factor 0.
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
