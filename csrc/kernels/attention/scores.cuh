#pragma once
// What attention does to scores besides the softmax: modifiers, causal and window masks, sinks, the lse. The terms come
// first, each written once, of a score in units of log2(e), its row's position and its key. What calls them is a
// layout: it says which row and which key a register holds.
#include "device/softmax.cuh"
#include "device/vec.cuh"
#include "schedule/attention_tile.cuh"

namespace forwardpass {

// softcap tanh(s / softcap): tanh(x) = 1 - 2 / (1 + exp(2 x)), exact to 2^-22 of the cap. unit: what a score has to be
// multiplied by to be in units of log2(e).
struct Softcap {
  float twice, cap, factor;
  __device__ Softcap(float softcap, float unit)
      : twice(2 * softcap * kLog2e), cap(softcap * kLog2e), factor(unit * 2 / softcap) {}
  __device__ float operator()(float s) const { return cap - __fdividef(twice, 1 + ptx::ex2(s * factor)); }
};

// slope: of the head, in units of log2(e).
__device__ inline float with_alibi(float s, float slope, int position, int key) {
  return fmaf(-slope, fabsf(static_cast<float>(position - key)), s);
}
template <class Params>
__device__ inline float alibi_slope(const Params& p, int batch, int head) {
  return p.alibi_slopes ? p.alibi_slopes[batch * p.alibi_batch_stride + head] * kLog2e : 0;
}

// The sink of a head, a logit that enters the denominator only; -inf without one.
template <class Params>
__device__ inline float sink_of(const Params& p, int head) {
  return p.sinks ? load_float(p.sinks, p.sinks_dtype, head) * kLog2e : -INFINITY;
}

// The keys that a row attends to: from first to end.
struct KeyRange {
  int first, end;
};

// One value for each row that a thread has of accumulators.
template <class Scores, class T>
using RowOf = T[Scores::kTilesM][2];

// Score modifiers: from q k to scores in units of log2(e), with softcap, ALiBi and the mask, which gives -inf; on a
// warp's accumulators. Without any of them the softmax scales q k itself. kMask: there may be a mask.
template <class Scores, bool kMask = true>
class ScoreModifiers {
 public:
  // What of a mask of 8 or 16 bits a thread loads for a block of keys, four words at a time.
  using MaskWords = RowOf<Scores, uint32_t[(Scores::kTilesN + 3) / 4][4]>;

  ScoreModifiers() = default;
  // Whether the mask's rows can be read 16 bytes at a time.
  __device__ static bool in_vectors(const AttentionParams& p, const AttentionTile& t) {
    const AttentionMask& m = p.mask;
    return m.column == 1 && (static_cast<unsigned>(m.batch | m.head | m.row | t.keys) * element_bytes(m) |
                             reinterpret_cast<uintptr_t>(m.data)) %
                                    16 ==
                                0;
  }
  // first_row: the warp's, in its sequence; vectors: in_vectors(p, t), which takes 60 instructions.
  __device__ ScoreModifiers(const AttentionParams& p, const AttentionTile& t, int first_row, bool vectors)
      : p_(&p), last_key_(t.keys - 1), vectors_(vectors) {
    slope_ = alibi_slope(p, t.batch, t.head);
    const AttentionMask& m = p.mask;
    const unsigned size = element_bytes(m);
#pragma unroll
    for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = min(first_row + Scores::row(i, 2 * half), t.rows - 1);
        position_[i][half] = t.position(p, row);
        mask_[i][half] = static_cast<const char*>(m.data) + (t.batch * m.batch + t.head * m.head + row * m.row) * size;
      }
  }
  // Begins to load the mask of a block of keys, before there are scores, as loads take long. What is not read in
  // vectors, and float32, which would take 64 registers, is loaded when it is needed.
  __device__ void load(MaskWords& words, int first_key) const {
    if (!kMask || !vectors_) return;
    if (p_->mask.kind == AttentionMaskKind::boolean)
      load_vectors<uint8_t>(words, first_key);
    else if (p_->mask.kind == AttentionMaskKind::f16 || p_->mask.kind == AttentionMaskKind::bf16)
      load_vectors<uint16_t>(words, first_key);
  }
  // first_key: of this thread's first column.
  __device__ void operator()(Scores& s, MaskWords& words, int first_key) const {
    if (p_->softcap > 0) {
      const Softcap cap(p_->softcap, p_->scale * kLog2e);
      s.for_each([&](float& v, int, int, int) { v = cap(v); });
    } else {
      const float scale = p_->scale * kLog2e;
      s.for_each([&](float& v, int, int, int) { v *= scale; });
    }
    if (p_->alibi_slopes)
      s.for_each([&](float& v, int i, int j, int e) {
        v = with_alibi(v, slope_, position_[i][e / 2], first_key + j * 8 + e % 2);
      });
    if constexpr (kMask) add_mask(s, words, first_key);
  }

 private:
  __device__ void add_mask(Scores& s, MaskWords& words, int first_key) const {
    switch (p_->mask.kind) {
      case AttentionMaskKind::none:
        break;
      case AttentionMaskKind::boolean:
        masked<uint8_t>(s, words, first_key,
                        [](float v, uint32_t word, int shift) { return word & 0xffu << shift ? v : -INFINITY; });
        break;
      case AttentionMaskKind::f16:
        masked<uint16_t>(s, words, first_key, add<__half>);
        break;
      case AttentionMaskKind::bf16:
        masked<uint16_t>(s, words, first_key, add<__nv_bfloat16>);
        break;
      case AttentionMaskKind::f32:
        masked(s, first_key);
    }
  }
  __device__ static unsigned element_bytes(const AttentionMask& m) {
    return m.kind == AttentionMaskKind::boolean ? 1 : m.kind == AttentionMaskKind::f32 ? 4 : 2;
  }
  template <class T>
  __device__ static float add(float v, uint32_t word, int shift) {
    const auto bits = static_cast<uint16_t>(word >> shift);
    return fmaf(to_float(*reinterpret_cast<const T*>(&bits)), kLog2e, v);
  }
  // An element of the mask. A key beyond the last one reads the last one's: its score is not used.
  template <class T>
  __device__ T element(int i, int half, int key) const {
    const int step = static_cast<int>(p_->mask.column * sizeof(T));  // 32 bits, so that an address is one multiply-add
    return *reinterpret_cast<const T*>(mask_[i][half] + int64_t{min(key, last_key_)} * step);
  }
  // f(i, half) for each row of this thread
  template <class F>
  __device__ static void each_row(F f) {
#pragma unroll
    for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) f(i, half);
  }
  // A lane's scores are two columns of each tile of eight, but it loads 16 bytes of neighbours: one lane after the
  // other those of one tile, or of two.
  template <class T>
  static constexpr int kTiles = 16 / sizeof(T) / 8;
  template <class T>
  static constexpr int kChunks = (Scores::kTilesN + kTiles<T> - 1) / kTiles<T>;

  template <class T>
  __device__ void load_vectors(MaskWords& words, int first_key) const {
    each_row([&](int i, int half) {
#pragma unroll
      for (int k = 0; k < (kChunks<T> + 3) / 4; ++k) {
        const int chunk = k * 4 + thread_in_group(), key = first_key - accumulator_column(0) + chunk * kTiles<T> * 8;
        uint4 x{};
        if (chunk < kChunks<T> && key <= last_key_)
          x = *reinterpret_cast<const uint4*>(mask_[i][half] + key * int64_t{sizeof(T)});
        words[i][half][k][0] = x.x, words[i][half][k][1] = x.y, words[i][half][k][2] = x.z, words[i][half][k][3] = x.w;
      }
    });
  }
  // Adds the mask, whose elements are in `words` if they are read in vectors, by f(score, word, position of its bits).
  template <class T, class F>
  __device__ void masked(Scores& s, MaskWords& words, int first_key, F f) const {
    constexpr int kBits = 8 * sizeof(T);
    each_row([&](int i, int half) {
      auto& x = words[i][half];
      if (vectors_) {
        if constexpr (kTiles<T> == 2) {  // a word for each lane: two bytes of either tile
#pragma unroll
          for (auto& w : x) {
            const uint32_t tiles[2][2] = {{w[0], w[1]}, {w[2], w[3]}};
#pragma unroll
            for (int lane = 0; lane < 4; ++lane)
              w[lane] = __byte_perm(tiles[0][lane / 2], tiles[1][lane / 2], lane % 2 ? 0x7632 : 0x5410);
          }
        }
        transpose_in_group(x);
      } else {
#pragma unroll
        for (int j = 0; j < Scores::kTilesN; ++j)
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const int chunk = j / kTiles<T>, shift = (j % kTiles<T> * 2 + e) * kBits;
            const uint32_t bits = element<T>(i, half, first_key + j * 8 + e);
            auto& word = x[chunk / 4][chunk % 4];
            word = shift ? word | bits << shift : bits;
          }
      }
    });
    s.for_each([&](float& v, int i, int j, int e) {
      const int chunk = j / kTiles<T>, shift = (j % kTiles<T> * 2 + e % 2) * kBits;
      v = f(v, words[i][e / 2][chunk / 4][chunk % 4], shift);
    });
  }
  // The same of float32.
  __device__ void masked(Scores& s, int first_key) const {
    if (vectors_)
      each_row([&](int i, int half) {
#pragma unroll
        for (int j = 0; j < Scores::kTilesN; ++j) {
          const int key = first_key + j * 8;
          float2 m{};
          if (key <= last_key_) m = *reinterpret_cast<const float2*>(mask_[i][half] + key * int64_t{sizeof(float)});
          float &first = s[i][j][half * 2], &second = s[i][j][half * 2 + 1];
          first = fmaf(m.x, kLog2e, first), second = fmaf(m.y, kLog2e, second);
        }
      });
    else
      s.for_each([&](float& v, int i, int j, int e) {
        v = fmaf(element<float>(i, e / 2, first_key + j * 8 + e % 2), kLog2e, v);
      });
  }

  const AttentionParams* p_;
  int last_key_;
  float slope_;   // ALiBi's, in units of log2(e)
  bool vectors_;  // the mask's rows can be read 16 bytes at a time
  RowOf<Scores, int> position_;
  RowOf<Scores, const char*> mask_;  // each row's first key
};

// The keys that the causal mask and the window leave, for the rows of a thread, on a warp's accumulators.
template <class Scores>
struct RowBounds {
  RowOf<Scores, int> first, end;
  bool from_first;  // some first is not the first of all

  RowBounds() = default;
  // keys_of(r): the KeyRange of row r of the warp's.
  template <class F>
  __device__ RowBounds(bool from_first, F keys_of) : from_first(from_first) {
#pragma unroll
    for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const KeyRange keys = keys_of(Scores::row(i, 2 * half));
        first[i][half] = keys.first, end[i][half] = keys.end;
      }
  }
  // Rows of a tile from first_row on.
  __device__ RowBounds(const AttentionParams& p, const AttentionTile& t, int first_row)
      : RowBounds(t.first(p, t.rows - 1) > 0, [&](int r) {
          const int row = min(first_row + r, t.rows - 1);
          return KeyRange{t.first(p, row), t.end(p, row)};
        }) {}
  // -inf for all other keys. place_of(j, e): where the key of a score is, from first_key on. What has no window needs
  // one comparison a score.
  template <class F>
  __device__ void operator()(Scores& s, int first_key, F place_of) const {
    s.for_each([&](float& v, int i, int j, int e) {
      if (place_of(j, e % 2) >= end[i][e / 2] - first_key) v = -INFINITY;
    });
    if (!from_first) return;
    s.for_each([&](float& v, int i, int j, int e) {
      if (place_of(j, e % 2) < first[i][e / 2] - first_key) v = -INFINITY;
    });
  }
  // Of keys in their order; first_key: of this thread's first column.
  __device__ void operator()(Scores& s, int first_key) const {
    (*this)(s, first_key, [](int j, int e) { return j * 8 + e; });
  }
};

// first_row: the warp's, in its sequence.
template <class Scores>
__device__ inline void store_lse(const OnlineSoftmax<Scores::kTilesM>& softmax, const AttentionParams& p,
                                 const AttentionTile& tile, int first_row) {
  if (!p.lse || thread_in_group() != 0) return;
#pragma unroll
  for (int i = 0; i < Scores::kTilesM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = first_row + Scores::row(i, 2 * half);
      if (row < tile.rows) p.lse[tile.lse(p, row)] = softmax.lse(i, half);
    }
}

}  // namespace forwardpass
