#pragma once
// What the attention kernels share beside the softmax: which rows a block has, which of their keys count, and what is
// added to their scores.
#include "device/dispatch.h"
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "params/attention.h"

namespace forwardpass {

// What is a kernel of its own. T: of q, k, v and out; D, V: columns of q and k, and of v; General: with mask, ALiBi or
// softcap.
template <Dtype T, int D, int V, bool General>
struct AttentionInstance {
  static constexpr Dtype kT = T;
  static constexpr int kD = D, kV = V;
  static constexpr bool kGeneral = General;
};

// launch(AttentionInstance) of the bucket in which p's head dims run.
template <Dtype T, bool General, class Launch>
cudaError_t launch_bucket(const AttentionParams& p, Launch launch) {
  if (p.value_dim < p.head_dim) return launch(AttentionInstance<T, 192, 128, General>());
  if (p.head_dim <= 64) return launch(AttentionInstance<T, 64, 64, General>());
  if (p.head_dim <= 96) return launch(AttentionInstance<T, 96, 96, General>());
  if (p.head_dim <= 128) return launch(AttentionInstance<T, 128, 128, General>());
  if (p.head_dim <= 192) return launch(AttentionInstance<T, 192, 192, General>());
  return launch(AttentionInstance<T, 256, 256, General>());
}
template <class Launch>
cudaError_t launch_instance(const AttentionParams& p, Launch launch) {
  const bool general = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return dispatch<Dtype::f16, Dtype::bf16>(p.dtype, [&](auto T) {
    return general ? launch_bucket<T(), true>(p, launch) : launch_bucket<T(), false>(p, launch);
  });
}

// Heads that have tiles of their own: those of the whole batch, but for sequences one behind the other, whose tiles are
// one head's.
HOST_DEVICE inline int64_t all_heads(const AttentionParams& p) {
  return int64_t{p.heads} * (p.cu_seqlens_q ? 1 : p.batch);
}

// Tiles of `tile_rows` rows of a head; of sequences one behind the other at most one more for each, as one that begins
// within a tile has its own.
inline int64_t row_tiles(const AttentionParams& p, int tile_rows) {
  return p.cu_seqlens_q ? p.rows / tile_rows + p.batch : (int64_t{p.rows} + tile_rows - 1) / tile_rows;
}

// Heads of k and v of which tiles run together. Of an H100's 132 blocks four then read the same keys at about the same
// time, as at head dim 128 its memory could not feed each of them. Simulated, causal tiles of one head after the other
// end 12 % later.
constexpr unsigned kHeadsTogether = 32;

// The rows from `first` on that a sequence has of `total`. Nobody has looked at cu_seqlens on the host: whatever they
// say, what is read and written lies within the tensors.
struct SequenceRows {
  int first, rows;

  __device__ SequenceRows(const int32_t* cu_seqlens, int b, int total)
      : first(min(max(cu_seqlens[b], 0), total)), rows(min(max(cu_seqlens[b + 1], first), total) - first) {}
};

// Rows of one head that a block computes: from `row` on in their sequence.
struct AttentionTile {
  int batch, head, row;
  int rows, keys;                // of the sequence
  int64_t first_row, first_key;  // of the sequence, in q and out, and in k and v

  // Tiles of the last rows, which see the most keys where attention is causal, before the others: the multiprocessors
  // then end together. But only those of a few heads at a time, so that some that run together share keys in L2. False:
  // there is no such tile.
  __device__ bool find(const AttentionParams& p, int tile_rows, unsigned tiles, unsigned block) {
    const unsigned all = static_cast<unsigned>(all_heads(p)),
                   together = min(all, kHeadsTogether * (p.heads / p.kv_heads)),
                   first = block / (tiles * together) * together, count = min(together, all - first),
                   within = block - first * tiles, of_all = first + within % count;
    int tile = static_cast<int>(within / count), last;
    head = static_cast<int>(of_all % p.heads), batch = static_cast<int>(of_all / p.heads);
    rows = p.rows, keys = p.keys, first_row = first_key = 0;
    if (p.cu_seqlens_q) {
      // Sequence b has the tiles from cu_seqlens_q[b] / tile_rows + b on: as many as it needs, or one more.
      batch = 0;
      for (int n = p.batch; n > 1;) {
        const int half = n / 2, b = batch + half;
        if (p.cu_seqlens_q[b] / tile_rows + b <= tile) batch = b;
        n = batch == b ? n - half : half;
      }
      const SequenceRows of_q(p.cu_seqlens_q, batch, p.rows), of_k(p.cu_seqlens_k, batch, p.keys);
      first_row = of_q.first, rows = of_q.rows;
      first_key = of_k.first, keys = of_k.rows;
      tile -= of_q.first / tile_rows + batch;
    }
    last = (rows - 1) / tile_rows;
    row = (last - tile) * tile_rows;
    return rows > 0 && tile >= 0 && tile <= last;
  }
  __device__ int kv_head(const AttentionParams& p) const { return head / (p.heads / p.kv_heads); }
  __device__ int64_t q(const AttentionParams& p) const {
    return batch * p.q.batch + head * p.q.head + first_row * p.q.row;
  }
  __device__ int64_t k(const AttentionParams& p) const {
    return batch * p.k.batch + kv_head(p) * p.k.head + first_key * p.k.row;
  }
  __device__ int64_t v(const AttentionParams& p) const {
    return batch * p.v.batch + kv_head(p) * p.v.head + first_key * p.v.row;
  }
  // A row of out, [batch, rows, heads, value_dim].
  __device__ int64_t out(const AttentionParams& p, int r) const {
    return ((p.cu_seqlens_q ? first_row : int64_t{batch} * rows) + r) * p.heads * p.value_dim +
           int64_t{head} * p.value_dim;
  }
  // A row of the lse, [batch, heads, rows] or [heads, rows].
  __device__ int64_t lse(const AttentionParams& p, int r) const {
    return p.cu_seqlens_q ? int64_t{head} * p.rows + first_row + r : (int64_t{batch} * p.heads + head) * rows + r;
  }
  // Where a row stands among the keys: rows end where keys end.
  __device__ int place(int r) const { return r + keys - rows; }
  // The keys from first to end count for a row.
  __device__ int first(const AttentionParams& p, int r) const {
    // unsigned, as of place - p.left nvcc 13.0 makes max(place - p.left, 0), which an unlimited left overflows
    return p.left >= place(r) ? 0 : static_cast<int>(static_cast<unsigned>(place(r)) - p.left);
  }
  __device__ int end(const AttentionParams& p, int r) const {
    return p.right >= rows - 1 - r ? keys : place(r) + p.right + 1;
  }
};

// Blocks of `n` keys for a tile: from begin to end some key counts for some row, from clean_begin to clean_end every
// key does for every row.
struct KeyBlocks {
  int begin, clean_begin, clean_end, end;

  KeyBlocks() = default;
  __device__ KeyBlocks(const AttentionParams& p, const AttentionTile& t, int tile_rows, int n) {
    const int last_row = min(t.row + tile_rows, t.rows) - 1;
    const int first = t.first(p, t.row), stop = t.end(p, last_row);
    begin = first / n, end = stop > first ? (stop + n - 1) / n : begin;
    clean_begin = min((t.first(p, last_row) + n - 1) / n, end);
    clean_end = max(t.end(p, t.row), 0) / n;
    if (clean_end <= clean_begin) clean_begin = clean_end = begin;
  }
};

// From products of q and k to scores in units of log2(e), with what a model adds to them, and -inf for keys that the
// mask leaves out: on a warp's fragment (softmax.cuh). Where a model adds nothing the softmax scales the products
// itself.
template <int kRows, int kTiles>
class Scores {
 public:
  using Fragment = float[kRows][kTiles][4];

  // row: the first that this thread has.
  __device__ Scores(const AttentionParams& p, const AttentionTile& t, int row) : p_(p), last_key_(t.keys - 1) {
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
    const int step = static_cast<int>(p_.mask.column * sizeof(T));  // of 32 bits: an address is one multiply-add
    each(s, key, [&](float& v, int r, int half, int k) {            // what a key beyond the last one gets is not used
      const auto row = reinterpret_cast<const char*>(static_cast<const T*>(p_.mask.data) + mask_[r][half]);
      v = f(v, *reinterpret_cast<const T*>(row + int64_t{min(k, last_key_)} * step));
    });
  }

  const AttentionParams& p_;
  int last_key_;
  float slope_;  // of ALiBi, in units of log2(e)
  int place_[kRows][2];
  int64_t mask_[kRows][2];  // of each row's first key, in elements
};

// The keys that count for the rows of a thread's fragment.
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
  // -inf for the others; key: of the first column that this thread has.
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

// own: the first row that this thread has, in its sequence.
template <int kRows>
__device__ inline void store_lse(const RowValues<kRows>& lse, const AttentionParams& p, const AttentionTile& tile,
                                 int own) {
  if (!p.lse || threadIdx.x % 4) return;
#pragma unroll
  for (int r = 0; r < 2 * kRows; ++r)
    if (own + r * 8 < tile.rows) p.lse[tile.lse(p, own + r * 8)] = lse[r / 2][r % 2];
}

// A row's logit in the denominator alone, in units of log2(e); -inf without.
__device__ inline float sink_of(const AttentionParams& p, int head) {
  if (!p.sinks) return -INFINITY;
  const float sink = p.sinks_dtype == Dtype::f32   ? static_cast<const float*>(p.sinks)[head]
                     : p.sinks_dtype == Dtype::f16 ? to_float(static_cast<const __half*>(p.sinks)[head])
                                                   : to_float(static_cast<const __nv_bfloat16*>(p.sinks)[head]);
  return sink * kLog2e;
}

}  // namespace forwardpass
