#pragma once
// What attention does to the scores of a tile besides the softmax: modifiers, causal and window masks, sinks, the lse.
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "schedule/attention_tile.cuh"

namespace forwardpass {

// One value for each row that a thread has of accumulators.
template <class Scores, class T>
using RowOf = T[Scores::kTilesM][2];

// Score modifiers: from q k to scores in units of log2(e), with softcap, ALiBi and the mask, which gives -inf; on a
// warp's accumulators. Without any of them the softmax scales q k itself.
template <class Scores>
class ScoreModifiers {
 public:
  // first_row: the warp's, in its sequence.
  __device__ ScoreModifiers(const AttentionParams& p, const AttentionTile& t, int first_row)
      : p_(p), last_key_(t.keys - 1) {
    slope_ = p.alibi_slopes ? p.alibi_slopes[t.batch * p.alibi_batch_stride + t.head] * kLog2e : 0;
#pragma unroll
    for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + Scores::row(i, 2 * half), t.rows - 1);
        position_[i][half] = t.position(row);
        mask_[i][half] = t.batch * p.mask.batch + t.head * p.mask.head + row * p.mask.row;
      }
  }
  // first_key: of this thread's first column.
  __device__ void operator()(Scores& s, int first_key) const {
    if (p_.softcap > 0) {  // tanh(x) = 1 - 2 / (1 + exp(2 x)), exact to 2^-22 of the cap
      const float twice = 2 * p_.softcap * kLog2e, cap = p_.softcap * kLog2e, x = p_.scale * 2 * kLog2e / p_.softcap;
      each(s, first_key, [&](float& v, int, int, int) { v = cap - __fdividef(twice, 1 + ptx::ex2(v * x)); });
    } else {
      const float scale = p_.scale * kLog2e;
      each(s, first_key, [&](float& v, int, int, int) { v *= scale; });
    }
    if (p_.alibi_slopes)
      each(s, first_key, [&](float& v, int i, int half, int key) {
        v = fmaf(-slope_, fabsf(static_cast<float>(position_[i][half] - key)), v);
      });
    switch (p_.mask.kind) {
      case AttentionMaskKind::none:
        break;
      case AttentionMaskKind::boolean:
        masked<uint8_t>(s, first_key, [](float v, uint8_t m) { return m ? v : -INFINITY; });
        break;
      case AttentionMaskKind::f16:
        masked<__half>(s, first_key, add<__half>);
        break;
      case AttentionMaskKind::bf16:
        masked<__nv_bfloat16>(s, first_key, add<__nv_bfloat16>);
        break;
      case AttentionMaskKind::f32:
        masked<float>(s, first_key, add<float>);
    }
  }

 private:
  template <class T>
  __device__ static float add(float v, T m) {
    return fmaf(to_float(m), kLog2e, v);
  }
  // f(score, i, half, key): half is 0 in the upper eight rows of tile i, 1 in the lower ones
  template <class F>
  __device__ static void each(Scores& s, int first_key, F f) {
    s.for_each([&](float& v, int i, int j, int e) { f(v, i, e / 2, first_key + j * 8 + e % 2); });
  }
  template <class T, class F>
  __device__ void masked(Scores& s, int first_key, F f) const {
    const int step = static_cast<int>(p_.mask.column * sizeof(T));  // 32 bits, so that an address is one multiply-add
    each(s, first_key, [&](float& v, int i, int half, int key) {
      // A key beyond the last one reads the last one's mask; its score is not used.
      const auto row = reinterpret_cast<const char*>(static_cast<const T*>(p_.mask.data) + mask_[i][half]);
      v = f(v, *reinterpret_cast<const T*>(row + int64_t{min(key, last_key_)} * step));
    });
  }

  const AttentionParams& p_;
  int last_key_;
  float slope_;  // ALiBi's, in units of log2(e)
  RowOf<Scores, int> position_;
  RowOf<Scores, int64_t> mask_;  // offset of each row's first key, in elements
};

// The keys that the causal mask and the window leave, for the rows of a thread.
template <class Scores>
struct RowBounds {
  RowOf<Scores, int> first, count;

  __device__ RowBounds(const AttentionParams& p, const AttentionTile& t, int first_row) {
#pragma unroll
    for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + Scores::row(i, 2 * half), t.rows - 1);
        first[i][half] = t.first(p, row), count[i][half] = max(t.end(p, row) - t.first(p, row), 0);
      }
  }
  // -inf for all other keys; first_key: of this thread's first column.
  __device__ void operator()(Scores& s, int first_key) const {
    s.for_each([&](float& v, int i, int j, int e) {
      const unsigned from_first = first_key + j * 8 + e % 2 - first[i][e / 2];
      if (from_first >= static_cast<unsigned>(count[i][e / 2])) v = -INFINITY;
    });
  }
};

// first_row: the warp's, in its sequence.
template <class Scores>
__device__ inline void store_lse(const RowValues<Scores::kTilesM>& lse, const AttentionParams& p,
                                 const AttentionTile& tile, int first_row) {
  if (!p.lse || thread_in_group() != 0) return;
#pragma unroll
  for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + Scores::row(i, 2 * half);
      if (row < tile.rows) p.lse[tile.lse(p, row)] = lse[i][half];
    }
}

// The sink of a head, a logit that enters the denominator only, in units of log2(e); -inf without one.
__device__ inline float sink_of(const AttentionParams& p, int head) {
  if (!p.sinks) return -INFINITY;
  const float sink = p.sinks_dtype == Dtype::f32   ? static_cast<const float*>(p.sinks)[head]
                     : p.sinks_dtype == Dtype::f16 ? to_float(static_cast<const __half*>(p.sinks)[head])
                                                   : to_float(static_cast<const __nv_bfloat16*>(p.sinks)[head]);
  return sink * kLog2e;
}

}  // namespace forwardpass
