#pragma once
// q, k and v of attention in 8 bits, as python/forwardpass/ops/attention_8bit/reference.py makes them, bit for bit, and
// as the products read them.
#include <algorithm>
#include <vector>

#include "cpu/memory.h"
#include "cpu/vector.h"
#include "params/attention_8bit.h"

namespace forwardpass::cpu {

// Keys that share the unit of their probabilities; and columns of a panel, whose products are computed together.
constexpr int64_t kBlockKeys = 64, kPanelColumns = 64;
// Four bytes of each column, of which one instruction adds all products.
constexpr int64_t kPanelRow = 4 * kPanelColumns;
constexpr int64_t kGroupKeys = 8;     // that share a scale of k
constexpr int64_t kMostSamples = 64;  // keys whose mean is subtracted from each

inline int64_t whole(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Rows and keys of one sequence.
struct Sequence {
  int64_t batch, first_row, rows, first_key, keys;

  // Of all sequences' rows of q, and keys.
  int64_t row_token(const AttentionParams& p, int64_t row) const { return batch * p.rows + first_row + row; }
  int64_t key_token(const AttentionParams& p, int64_t key) const { return batch * p.keys + first_key + key; }

  int64_t blocks() const { return (keys + kBlockKeys - 1) / kBlockKeys; }
};

// The sequences that are known, `known` of them where they are packed.
std::vector<Sequence> sequences_of(const AttentionParams& p, int64_t known);

// k and v of a head of a sequence. Keys behind the last one and columns behind the last one are zero.
struct Keys8bit {
  int8_t* k;             // [blocks][columns / 4][64 keys][4 columns]
  float* k_scale;        // [blocks * 64]
  int32_t* corrections;  // [blocks * 64]: -128 times the sum of a key's integers, as those of q are 128 too large
  int8_t* v;             // [blocks][panels][16][64 columns][4 keys]
  float* v_range;        // [panels * 64], the largest magnitude of a channel; where k and v are not given
  float* v_block_range;  // [blocks][panels * 64], that of each block; where k and v are not given
  float* v_scale;        // [panels * 64], 1/127 of that
  float* v_block_scale;  // [blocks], of v in units of v_scale
  float* centre;         // [columns], of k; where k and v are not given

  // Where an integer is; columns: of a row, as Operands8bit has them.
  int8_t& k_at(int64_t columns, int64_t key, int64_t c) const {
    return k[key / kBlockKeys * kBlockKeys * columns + c / 4 * 4 * kBlockKeys + key % kBlockKeys * 4 + c % 4];
  }
  int8_t& v_at(int64_t columns, int64_t key, int64_t c) const {
    return v[key / kBlockKeys * kBlockKeys * columns + c / kPanelColumns * kPanelColumns * kBlockKeys +
             key % kBlockKeys / 4 * kPanelRow + c % kPanelColumns * 4 + key % 4];
  }
};

// The quantised k and v of all heads of all sequences.
class Operands8bit {
 public:
  // Of a call's q, k and v, or k and v as they are given.
  Operands8bit(const Attention8bitParams& p, std::vector<Sequence> sequences);

  Keys8bit keys(int64_t sequence, int64_t kv_head) const;
  const std::vector<Sequence>& sequences() const { return sequences_; }
  const Attention8bitParams& params() const { return p_; }

  int64_t columns() const { return columns_; }
  int64_t value_columns() const { return panels_ * kPanelColumns; }
  int64_t panels() const { return panels_; }
  // Columns that a row of q or k takes as floats.
  int64_t row_floats() const { return whole(p_.head_dim, kMostLanes); }
  // Of the columns that are rotated together; 1: none are.
  int64_t rotated() const { return rotated_; }

 private:
  void find_ranges();
  void quantize();
  void take_given();

  const Attention8bitParams& p_;
  const std::vector<Sequence> sequences_;
  const int64_t columns_, panels_, rotated_;
  std::vector<int64_t> offsets_;  // of the sequences, in blocks
  CacheLines k_, k_scale_, corrections_, v_, v_range_, v_block_range_, v_scale_, v_block_scale_, centre_;
};

// The lowest byte of each lane. Written as assembly: here g++ 12 made of narrow() a fifth of the op's time, lane by
// lane.
template <class V>
INLINE void store_low_bytes(Ints<V> v, void* to) {
#if defined(__x86_64__)
  if constexpr (kLanes<V> == 16) {
    asm("vpmovdb %1, %0" : "=m"(*static_cast<char (*)[16]>(to)) : "v"(v));
    return;
  }
#endif
  store_bits(narrow<Chars<V>>(v), static_cast<int8_t*>(to), kLanes<V>);
}

// The integer whose magnitude as a float is the largest, of vectors of lanes; NaN where one is NaN or infinite.
template <class V>
INLINE float range_of(Uints<V> highs) {
  const float range = bits<float>(static_cast<uint32_t>(largest(highs)));
  return range < INFINITY ? range : NAN;
}
// What values are multiplied by to be integers; the scale is the range / 127. Of a smaller range they are zero.
inline float inverse_of(float range) { return range >= kLeastRange ? 127 / range : 0; }

// (a, b) becomes (a + b, a - b), in lanes kStep apart.
template <int kStep, class V>
INLINE V butterfly(V x) {
  const V other = permute<[](int i) { return i ^ kStep; }>(x, x);
  return (lane_numbers<V>() & kStep) != 0 ? other - x : x + other;
}

// Blocks of n columns, a power of two, times a Hadamard matrix of +-1. Behind the columns there are zeros, to a whole
// vector.
template <class V>
INLINE void rotate(float* x, int64_t columns, int64_t n) {
  if (n > 1)  // of the first steps each in a pass of its own took twice as long
    for (int64_t c = 0; c < columns; c += kLanes<V>) {
      V v = butterfly<1>(load<V, Dtype::f32>(x, c));
      if (n > 2) v = butterfly<2>(v);
      if constexpr (kLanes<V> > 4)
        if (n > 4) v = butterfly<4>(v);
      if constexpr (kLanes<V> > 8)
        if (n > 8) v = butterfly<8>(v);
      store<Dtype::f32>(v, x, c);
    }
  for (int64_t step = kLanes<V>; step < n; step *= 2)
    for (int64_t begin = 0; begin < columns; begin += 2 * step)
      for (int64_t c = begin; c < begin + step; c += kLanes<V>) {
        const V a = load<V, Dtype::f32>(x, c), b = load<V, Dtype::f32>(x, c + step);
        store<Dtype::f32>(a + b, x, c), store<Dtype::f32>(a - b, x, c + step);
      }
}

// A row of q or k, minus its centre where there is one, and rotated, as floats to x; its largest magnitude.
template <class V, Dtype D>
INLINE float rotate_row(const Operands8bit& o, const void* row, const float* centre, float* x) {
  const int64_t columns = o.params().head_dim;
  for_each_vector<V>(
      0, columns, VECTOR_BODY(&) {
        V v = load<V, D>(row, c, n);
        if (centre) v -= load<V, Dtype::f32>(centre, c, n);
        store<Dtype::f32>(v, x, c);
      });
  rotate<V>(x, columns, o.rotated());
  Uints<V> highs{};
  for (int64_t c = 0; c < columns; c += kLanes<V>)
    highs = max(highs, bits<Uints<V>>(load<V, Dtype::f32>(x, c)) & 0x7fffffff);
  return range_of<V>(highs);
}

// The integers of a row of floats whose largest magnitude is `range`, plus an offset.
template <class V, int kOffset>
INLINE void round_row(const Operands8bit& o, const float* x, float range, void* integers) {
  const float inverse = inverse_of(range);
  for (int64_t c = 0; c < o.params().head_dim; c += kLanes<V>)
    store_low_bytes<V>(to_int(load<V, Dtype::f32>(x, c) * inverse, -127, 127) + kOffset,
                       static_cast<char*>(integers) + c);
}

// The integers of a row of q, plus an offset; its scale. `x` is room for the row as floats.
template <class V, Dtype D, int kOffset>
INLINE float quantize_row(const Operands8bit& o, const void* row, float* x, void* integers) {
  const float range = rotate_row<V, D>(o, row, nullptr, x);
  round_row<V, kOffset>(o, x, range, integers);
  return range / 127;
}

// A row of q in 16 bits or float32 of a head, times k's centre.
template <class V, Dtype D>
INLINE float shift_of(const AttentionParams& p, const void* q, const float* centre) {
  V shift{};
  for_each_vector<V>(
      0, p.head_dim, VECTOR_BODY(&) { shift += load<V, D>(q, c, n) * load<V, Dtype::f32>(centre, c, n); });
  return sum(shift);
}

// Where a row of q, k or v is, of a sequence whose first one is `first`.
inline const char* row_of(const AttentionParams& p, const AttentionTensor& t, const Sequence& s, int64_t first,
                          int64_t head, int64_t row) {
  return static_cast<const char*>(t.data) +
         (s.batch * t.batch + (first + row) * t.row + head * t.head) * size_of(p.dtype);
}

}  // namespace forwardpass::cpu
