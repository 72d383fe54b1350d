#pragma once
// What attention does to the scores of a tile besides the softmax: modifiers, causal and window masks, sinks, the lse.
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "schedule/attention_tile.cuh"

namespace forwardpass {

// Score modifiers: from q k to scores in units of log2(e), with softcap, ALiBi and the mask, which gives -inf; on a
// warp's fragment (softmax.cuh). Without any of them the softmax scales q k itself.
template <int kRows, int kTiles>
class ScoreModifiers {
 public:
  using Fragment = float[kRows][kTiles][4];

  // row: this thread's first.
  __device__ ScoreModifiers(const AttentionParams& p, const AttentionTile& t, int row) : p_(p), last_key_(t.keys - 1) {
    slope_ = p.alibi_slopes ? p.alibi_slopes[t.batch * p.alibi_batch_stride + t.head] * kLog2e : 0;
#pragma unroll
    for (int r = 0; r < 2 * kRows; ++r) {
      const int at = min(row + r * 8, t.rows - 1);
      place_[r / 2][r % 2] = t.place(at);
      mask_[r / 2][r % 2] = t.batch * p.mask.batch + t.head * p.mask.head + at * p.mask.row;
    }
  }
  // key: of the first column that this thread has.
  __device__ void operator()(Fragment& s, int key) const {
    if (p_.softcap > 0) {  // tanh(x) = 1 - 2 / (1 + exp(2 x)), exact to 2^-22 of the cap
      const float twice = 2 * p_.softcap * kLog2e, cap = p_.softcap * kLog2e, x = p_.scale * 2 * kLog2e / p_.softcap;
      each(s, key, [&](float& v, int, int, int) { v = cap - __fdividef(twice, 1 + ptx::ex2(v * x)); });
    } else {
      const float scale = p_.scale * kLog2e;
      each(s, key, [&](float& v, int, int, int) { v *= scale; });
    }
    if (p_.alibi_slopes)
      each(s, key, [&](float& v, int r, int half, int k) {
        v = fmaf(-slope_, fabsf(static_cast<float>(place_[r][half] - k)), v);
      });
    switch (p_.mask.kind) {
      case AttentionMaskKind::none:
        break;
      case AttentionMaskKind::boolean:
        masked<uint8_t>(s, key, [](float v, uint8_t m) { return m ? v : -INFINITY; });
        break;
      case AttentionMaskKind::f16:
        masked<__half>(s, key, add<__half>);
        break;
      case AttentionMaskKind::bf16:
        masked<__nv_bfloat16>(s, key, add<__nv_bfloat16>);
        break;
      case AttentionMaskKind::f32:
        masked<float>(s, key, add<float>);
    }
  }

 private:
  template <class T>
  __device__ static float add(float v, T m) {
    return fmaf(to_float(m), kLog2e, v);
  }
  template <class F>
  __device__ static void each(Fragment& s, int key, F f) {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) f(s[r][t][e], r, e / 2, key + t * 8 + e % 2);
  }
  template <class T, class F>
  __device__ void masked(Fragment& s, int key, F f) const {
    const int step = static_cast<int>(p_.mask.column * sizeof(T));  // 32 bits, so that an address is one multiply-add
    each(s, key,
         [&](float& v, int r, int half,
             int k) {  // a key beyond the last one reads the last one's mask; its score is not used
           const auto row = reinterpret_cast<const char*>(static_cast<const T*>(p_.mask.data) + mask_[r][half]);
           v = f(v, *reinterpret_cast<const T*>(row + int64_t{min(k, last_key_)} * step));
         });
  }

  const AttentionParams& p_;
  int last_key_;
  float slope_;  // ALiBi's, in units of log2(e)
  int place_[kRows][2];
  int64_t mask_[kRows][2];  // offset of each row's first key, in elements
};

// The keys that the causal mask and the window leave, for the rows of a thread's fragment.
template <int kRows>
struct RowBounds {
  int first[kRows][2], count[kRows][2];

  __device__ RowBounds(const AttentionParams& p, const AttentionTile& t, int row) {
#pragma unroll
    for (int r = 0; r < 2 * kRows; ++r) {
      const int at = min(row + r * 8, t.rows - 1);
      first[r / 2][r % 2] = t.first(p, at), count[r / 2][r % 2] = max(t.end(p, at) - t.first(p, at), 0);
    }
  }
  // -inf for all other keys; key: that of this thread's first column.
  template <int kTiles>
  __device__ void operator()(float (&s)[kRows][kTiles][4], int key) const {
#pragma unroll
    for (int r = 0; r < kRows; ++r)
#pragma unroll
      for (int t = 0; t < kTiles; ++t)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          const unsigned at = key + t * 8 + e % 2 - first[r][e / 2];
          if (at >= static_cast<unsigned>(count[r][e / 2])) s[r][t][e] = -INFINITY;
        }
  }
};

// own: this thread's first row in its sequence.
template <int kRows>
__device__ inline void store_lse(const RowValues<kRows>& lse, const AttentionParams& p, const AttentionTile& tile,
                                 int own) {
  if (!p.lse || threadIdx.x % 4) return;
#pragma unroll
  for (int r = 0; r < 2 * kRows; ++r)
    if (own + r * 8 < tile.rows) p.lse[tile.lse(p, own + r * 8)] = lse[r / 2][r % 2];
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
