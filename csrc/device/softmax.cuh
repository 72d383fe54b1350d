#pragma once
// Online softmax, over one block of keys after the other, on accumulators: of each tile of sixteen rows a thread has
// two (elements 0 and 1, elements 2 and 3 of its tiles), which it shares with the other lanes of its group.
#include "device/fragments.cuh"
#include "device/upconvert.cuh"

namespace forwardpass {

constexpr float kLn2 = 0.693147181f;

// By how much, in units of log2(e), scores may exceed the maximum that is subtracted before theirs takes its place. p
// is up to 2^8 then, which 16 bits hold as well as 1, and outputs are seldom rescaled: of 16 x 1024 x 16 causal rows of
// normal data, on wgmma, 0.03 times a tile in place of 3.5.
constexpr float kMostGrowth = 8;

// One value per row of a thread.
template <int kTilesM>
using RowValues = float[kTilesM][2];

// Two values, rounded to D: a register of an mma's first operand.
template <Dtype D>
__device__ inline uint32_t pack(float low, float high) {
  if constexpr (D == Dtype::f16)
    return bits_of(__floats2half2_rn(low, high));
  else
    return bits_of(__floats2bfloat162_rn(low, high));
}

// Two n8 tiles of accumulators are, as they are, the first operand of an mma: sixteen of its columns.
template <Dtype D, int kTilesN>
__device__ inline void pack_operand(uint32_t (&a)[4], const float (&p)[kTilesN][4], int step) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const auto& tile = p[step * 2 + i / 2];
    a[i] = pack<D>(tile[i % 2 * 2], tile[i % 2 * 2 + 1]);
  }
}

template <int kTilesM, int kTilesN>
__device__ inline void rescale(Fragments<float, kTilesM, kTilesN>& o, const RowValues<kTilesM>& factor) {
  o.for_each([&](float& v, int i, int, int e) { v *= factor[i][e / 2]; });
}

// Of a row's scores, in units of log2(e): the largest, the sum of 2^(score - largest), and a sink, which is one more
// score without a value; -inf without one. A row without keys has factor 0.
struct Denominator {
  float base, sum;  // sum: of 2^(score - base), the sink's included
  float factor;     // what the values have to be multiplied by, which are relative to `largest`

  __device__ Denominator(float largest, float keys, float sink) {
    const float all = fmaxf(largest, sink);
    base = all == -INFINITY ? 0 : all;
    const float unit = ptx::ex2(largest - base);
    sum = fmaf(keys, unit, ptx::ex2(sink - base));
    factor = sum == 0 ? 0 : __fdividef(unit, sum);
  }
};
// The natural logarithm of a denominator.
__device__ inline float log_of_sum(float base, float sum) { return (base + log2f(sum)) * kLn2; }

template <int kTilesM>
struct OnlineSoftmax {
  RowValues<kTilesM> max, sum;  // max: in units of log2(e); sum: times 2^-max, over this thread's columns only

  __device__ OnlineSoftmax() {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) max[i][half] = -INFINITY, sum[i][half] = 0;
  }
  // Turns scores s, times `scale` in units of log2(e), into 2^(s - max). The output accumulators have to be multiplied
  // by `factor`. False: factor is 1 for all rows of the warp.
  template <int kTilesN>
  __device__ bool update(Fragments<float, kTilesM, kTilesN>& s, float scale, RowValues<kTilesM>& factor) {
    bool grown = false;
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float block_max = fmaxf(s[i][0][half * 2], s[i][0][half * 2 + 1]);
#pragma unroll
        for (int j = 1; j < kTilesN; ++j) block_max = fmaxf(block_max, fmaxf(s[i][j][half * 2], s[i][j][half * 2 + 1]));
        block_max = over_group(block_max, fmaxf) * scale;
        const float before = max[i][half];
        const bool grows = block_max > before + kMostGrowth;
        const float now = grows ? block_max : before;
        grown |= grows;
        max[i][half] = now;
        // A row whose scores are all -inf so far has no maximum to subtract: 2^(-inf - 0) is the 0 that it should be.
        const float base = now == -INFINITY ? 0 : now;
        factor[i][half] = ptx::ex2(before - base);
        float add;  // begins with the first value: adding it to 0 would be one more instruction
#pragma unroll
        for (int j = 0; j < kTilesN; ++j)
#pragma unroll
          for (int e = half * 2; e < half * 2 + 2; ++e) {
            s[i][j][e] = ptx::ex2(fmaf(s[i][j][e], scale, -base));
            add = j == 0 && e == half * 2 ? s[i][j][e] : add + s[i][j][e];
          }
        sum[i][half] = fmaf(sum[i][half], factor[i][half], add);
      }
    return __any_sync(0xffffffff, grown);
  }
  // After all keys: the output accumulators have to be multiplied by `factor`; sum is the whole row's, times 2^-max.
  // sink_of(i, half): one more score of a row, in units of log2(e).
  template <class F>
  __device__ void finish(F sink_of, RowValues<kTilesM>& factor) {
#pragma unroll
    for (int i = 0; i < kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Denominator d(max[i][half], sum_of_group(sum[i][half]), sink_of(i, half));
        factor[i][half] = d.factor, max[i][half] = d.base, sum[i][half] = d.sum;
      }
  }
  // Then: the natural logarithm of a row's denominator.
  __device__ float lse(int i, int half) const { return log_of_sum(max[i][half], sum[i][half]); }
};

}  // namespace forwardpass
