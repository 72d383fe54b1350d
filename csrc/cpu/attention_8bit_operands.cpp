#include "cpu/attention_8bit_operands.h"

#include <cmath>

#include "cpu/attention_8bit.h"
#include "cpu/sequences.h"
#include "torch/check.h"

namespace forwardpass::cpu {
namespace {

constexpr int64_t kChunkBlocks = 8;  // that a thread quantises at a time

const char* key_of(const AttentionParams& p, const AttentionTensor& t, const Sequence& s, int64_t head, int64_t key) {
  return row_of(p, t, s, s.first_key, head, key);
}

template <class T>
T* at(const CacheLines& memory, int64_t i) {
  return reinterpret_cast<T*>(memory[0].bytes) + i;
}

// The mean of some keys, evenly spaced, added up in order.
template <class V, Dtype D>
INLINE void find_centre(const AttentionParams& p, const Sequence& s, int64_t head, float* centre) {
  const int64_t samples = std::min(s.keys, kMostSamples);
  const float share = samples ? static_cast<float>(1.0 / static_cast<double>(samples)) : 0;
  std::fill_n(centre, p.head_dim, 0.0f);
  for (int64_t i = 0; i < samples; ++i) {
    const char* k = key_of(p, p.k, s, head, i * (s.keys - 1) / std::max<int64_t>(samples - 1, 1));
    for_each_vector<V>(
        0, p.head_dim,
        VECTOR_BODY(&) { store<Dtype::f32>(load<V, Dtype::f32>(centre, c, n) + load<V, D>(k, c, n), centre, c, n); });
  }
  for_each_vector<V>(
      0, p.head_dim, VECTOR_BODY(&) { store<Dtype::f32>(load<V, Dtype::f32>(centre, c, n) * share, centre, c, n); });
}

// Of each channel of v the largest magnitude in each block and of all keys, NaN where one is NaN or infinite; and the
// channel's scale.
template <class V, Dtype D>
INLINE void find_v_range(const AttentionParams& p, const Sequence& s, int64_t head, int64_t value_columns,
                         const Keys8bit& to) {
  std::fill_n(to.v_range, value_columns, 0.0f);
  const auto highs = reinterpret_cast<uint32_t*>(to.v_range);
  for (int64_t first = 0; first < s.keys; first += kBlockKeys) {
    const auto of_block = reinterpret_cast<uint32_t*>(to.v_block_range + first / kBlockKeys * value_columns);
    const int64_t end = std::min(first + kBlockKeys, s.keys);
    for_each_vector<V>(
        0, p.value_dim, VECTOR_BODY(&) {
          Uints<V> high{};
          for (int64_t key = first; key < end; ++key)
            high = max(high, bits<Uints<V>>(load<V, D>(key_of(p, p.v, s, head, key), c, n)) & 0x7fffffff);
          store_bits(high, of_block + c, n);
          store_bits(max(load_bits<Uints<V>>(highs + c, n), high), highs + c, n);
        });
  }
  for (int64_t c = 0; c < p.value_dim; ++c)
    if (!(to.v_range[c] < INFINITY)) to.v_range[c] = NAN;
  for (int64_t c = 0; c < value_columns; ++c) to.v_scale[c] = to.v_range[c] / 127;
}

// Integers of a key, or zeros behind the last one, to the block's key i.
template <class V>
INLINE void pack_key(const Operands8bit& o, const Keys8bit& to, int64_t key, const int8_t* integers) {
  Ints<V> sums{};
  for (int64_t c = 0; c < o.columns(); c += kLanes<V>)  // `integers` has whole vectors, zero behind the columns
    sums += widen<Ints<V>>(load_bits<Chars<V>>(integers + c, kLanes<V>));
  to.corrections[key] = -128 * sum(sums);
  for (int64_t c = 0; c < o.columns(); c += 4) std::memcpy(&to.k_at(o.columns(), key, c), integers + c, 4);
}

// Of keys' largest magnitudes, n of one block, the largest of the group that shares a scale: keys are in the order of
// their magnitudes, of equal ones in their own. Those that are NaN come last, and stay as they are.
void share_ranges(float* ranges, int64_t n) {
  uint64_t order[kBlockKeys];
  for (int64_t i = 0; i < n; ++i) order[i] = uint64_t{bits<uint32_t>(ranges[i])} << 32 | static_cast<uint64_t>(i);
  std::sort(order, order + n);
  for (int64_t first = 0; first < n; first += kGroupKeys) {
    float most = 0;
    const int64_t end = std::min(first + kGroupKeys, n);
    for (int64_t i = first; i < end; ++i) most = std::fmax(most, ranges[static_cast<uint32_t>(order[i])]);
    for (int64_t i = first; i < end; ++i) {
      float& range = ranges[static_cast<uint32_t>(order[i])];
      if (range == range) range = most;
    }
  }
}

// A block of k. x: room for its rows as floats.
template <class V, Dtype D>
INLINE void pack_k(const Operands8bit& o, const Sequence& s, int64_t head, int64_t block, const Keys8bit& to, float* x,
                   int8_t* integers) {
  const AttentionParams& p = o.params();
  const float unrotate = 1 / static_cast<float>(o.rotated());
  const int64_t first = block * kBlockKeys, n = std::min(kBlockKeys, s.keys - first);
  float ranges[kBlockKeys];
  for (int64_t i = 0; i < n; ++i)
    ranges[i] = rotate_row<V, D>(o, key_of(p, p.k, s, head, first + i), to.centre, x + i * o.row_floats());
  share_ranges(ranges, n);
  for (int64_t i = 0; i < kBlockKeys; ++i) {
    if (i < n)
      round_row<V, 0>(o, x + i * o.row_floats(), ranges[i], integers);
    else
      std::fill_n(integers, o.columns(), int8_t{0});
    to.k_scale[first + i] = i < n ? ranges[i] / 127 * unrotate : 0;
    pack_key<V>(o, to, first + i, integers);
  }
}

// The largest magnitude of a block of v in units of its channels, of those without a NaN.
template <class V>
INLINE float range_in_units(const float* v_block_range, const float* inverse, int64_t columns) {
  Uints<V> highs{};
  for_each_vector<V>(
      0, columns, VECTOR_BODY(&) {
        const V range = load<V, Dtype::f32>(v_block_range, c, n) * load<V, Dtype::f32>(inverse, c, n);
        const Uints<V> high = bits<Uints<V>>(range) & 0x7fffffff;
        highs = max(highs, high > 0x7f800000 ? Uints<V>{} : high);
      });
  return range_of<V>(highs);
}

// A block of v.
template <class V, Dtype D>
INLINE void pack_v(const Operands8bit& o, const Sequence& s, int64_t head, int64_t block, const Keys8bit& to,
                   const float* inverse) {
  const AttentionParams& p = o.params();
  const float range = range_in_units<V>(to.v_block_range + block * o.value_columns(), inverse, p.value_dim),
              inverse_of_block = inverse_of(range);
  to.v_block_scale[block] = range / 127;
  int8_t* panels = to.v + block * kBlockKeys * o.value_columns();
  for (int64_t i = 0; i < kBlockKeys; i += 4) {
    const int64_t key = block * kBlockKeys + i;
    for_each_vector<V>(
        0, p.value_dim, VECTOR_BODY(&) {
          Ints<V> four{};
          for (int64_t j = 0; j < 4 && key + j < s.keys; ++j) {
            const V x = load<V, D>(key_of(p, p.v, s, head, key + j), c, n) * load<V, Dtype::f32>(inverse, c);
            four |= (to_int(x * inverse_of_block, -127, 127) & 255) << static_cast<int>(8 * j);
          }
          int8_t* panel = panels + c / kPanelColumns * kPanelColumns * kBlockKeys + i / 4 * kPanelRow;
          store_bits(four, reinterpret_cast<int32_t*>(panel) + c % kPanelColumns, kLanes<V>);
        });
  }
}

template <class F>
void with_vectors_and_dtype(Dtype dtype, F f) {
  with_vectors(VECTOR_CODE { with_float_dtype(dtype, [&](auto d) __attribute__((always_inline)) { f(V{}, d); }); });
}

}  // namespace

std::vector<Sequence> sequences_of(const AttentionParams& p, int64_t known) {
  std::vector<Sequence> sequences;
  for (int64_t b = 0; b < known; ++b) {
    if (p.cu_seqlens_q) {
      const int64_t row = p.cu_seqlens_q[b], key = p.cu_seqlens_k[b];
      sequences.push_back({0, row, p.cu_seqlens_q[b + 1] - row, key, p.cu_seqlens_k[b + 1] - key});
    } else {
      sequences.push_back({b, 0, p.rows, 0, p.keys});
    }
  }
  return sequences;
}

Operands8bit::Operands8bit(const Attention8bitParams& p, std::vector<Sequence> sequences)
    : p_(p),
      sequences_(std::move(sequences)),
      columns_(whole(p.head_dim, 4)),
      panels_(whole(p.value_dim, kPanelColumns) / kPanelColumns),
      rotated_(p.rotates ? p.head_dim & -p.head_dim : 1) {
  int64_t blocks = 0;
  for (const Sequence& s : sequences_) offsets_.push_back(blocks), blocks += s.blocks();
  const int64_t keys = blocks * kBlockKeys * p.kv_heads, heads = std::ssize(sequences_) * p.kv_heads;
  k_ = allocate(keys * columns_ + 1), v_ = allocate(keys * value_columns() + 1);
  k_scale_ = allocate(4 * keys + 1), corrections_ = allocate(4 * keys + 1);
  v_range_ = allocate(4 * heads * value_columns() + 1);
  v_block_range_ = allocate(4 * keys / kBlockKeys * value_columns() + 1);
  centre_ = allocate(4 * heads * row_floats() + 1);
  v_scale_ = allocate(4 * heads * value_columns() + 1), v_block_scale_ = allocate(4 * blocks * p.kv_heads + 1);
  if (p.quantized.q) {
    take_given();
  } else {
    find_ranges();
    quantize();
  }
}

Keys8bit Operands8bit::keys(int64_t sequence, int64_t kv_head) const {
  const int64_t key = (offsets_[sequence] * p_.kv_heads + sequences_[sequence].blocks() * kv_head) * kBlockKeys,
                head = sequence * p_.kv_heads + kv_head;
  return {.k = at<int8_t>(k_, key * columns_),
          .k_scale = at<float>(k_scale_, key),
          .corrections = at<int32_t>(corrections_, key),
          .v = at<int8_t>(v_, key * value_columns()),
          .v_range = at<float>(v_range_, head * value_columns()),
          .v_block_range = at<float>(v_block_range_, key / kBlockKeys * value_columns()),
          .v_scale = at<float>(v_scale_, head * value_columns()),
          .v_block_scale = at<float>(v_block_scale_, key / kBlockKeys),
          .centre = at<float>(centre_, head * row_floats())};
}

void Operands8bit::find_ranges() {
  torch::stable::parallel_for(0, std::ssize(sequences_) * p_.kv_heads, 1, [&](int64_t begin, int64_t end) {
    with_vectors_and_dtype(p_.dtype,
                           [&]<class V, Dtype D>(V, std::integral_constant<Dtype, D>) __attribute__((always_inline)) {
                             for (int64_t i = begin; i < end; ++i) {
                               const Sequence& s = sequences_[i / p_.kv_heads];
                               const int64_t head = i % p_.kv_heads;
                               const Keys8bit to = keys(i / p_.kv_heads, head);
                               find_centre<V, D>(p_, s, head, to.centre);
                               find_v_range<V, D>(p_, s, head, value_columns(), to);
                             }
                           });
  });
}

void Operands8bit::quantize() {
  struct Item {
    int64_t sequence, head, first, last;  // blocks
  };
  std::vector<Item> items;
  for (int64_t s = 0; s < std::ssize(sequences_); ++s)
    for (int64_t head = 0; head < p_.kv_heads; ++head)
      for (int64_t first = 0; first < sequences_[s].blocks(); first += kChunkBlocks)
        items.push_back({s, head, first, std::min(first + kChunkBlocks, sequences_[s].blocks())});
  torch::stable::parallel_for(0, std::ssize(items), 1, [&](int64_t begin, int64_t end) {
    std::vector<float> rows(kBlockKeys * row_floats()), inverse(value_columns());
    std::vector<int8_t> integers(row_floats());
    with_vectors_and_dtype(p_.dtype,
                           [&]<class V, Dtype D>(V, std::integral_constant<Dtype, D>) __attribute__((always_inline)) {
                             for (int64_t i = begin; i < end; ++i) {
                               const auto [s, head, first, last] = items[i];
                               const Keys8bit to = keys(s, head);
                               for (int64_t c = 0; c < value_columns(); ++c) inverse[c] = inverse_of(to.v_range[c]);
                               for (int64_t block = first; block < last; ++block) {
                                 pack_k<V, D>(*this, sequences_[s], head, block, to, rows.data(), integers.data());
                                 pack_v<V, D>(*this, sequences_[s], head, block, to, inverse.data());
                               }
                             }
                           });
  });
}

void Operands8bit::take_given() {
  const AttentionOperands& from = p_.quantized;
  torch::stable::parallel_for(0, std::ssize(sequences_) * p_.kv_heads, 1, [&](int64_t begin, int64_t end) {
    std::vector<int8_t> integers(row_floats());
    for (int64_t i = begin; i < end; ++i) {
      const Sequence& s = sequences_[i / p_.kv_heads];
      const int64_t head = i % p_.kv_heads;
      const Keys8bit to = keys(i / p_.kv_heads, head);
      std::fill_n(to.v, s.blocks() * kBlockKeys * value_columns(), int8_t{0});
      std::fill_n(to.v_scale, value_columns(), 0.0f);
      std::copy_n(from.v_scale + i * p_.value_dim, p_.value_dim, to.v_scale);
      for (int64_t key = 0; key < s.blocks() * kBlockKeys; ++key) {
        const int64_t token = s.key_token(p_, key) * p_.kv_heads + head;
        const bool inside = key < s.keys;
        to.k_scale[key] = inside ? from.k_scale[token] : 0;
        if (key % kBlockKeys == 0) to.v_block_scale[key / kBlockKeys] = from.v_block_scale[token];
        std::fill_n(integers.data(), row_floats(), int8_t{0});
        if (inside) std::copy_n(from.k + token * p_.head_dim, p_.head_dim, integers.data());
        with_vectors(VECTOR_CODE { pack_key<V>(*this, to, key, integers.data()); });
        if (!inside) continue;
        for (int64_t c = 0; c < p_.value_dim; ++c) to.v_at(value_columns(), key, c) = from.v[token * p_.value_dim + c];
      }
    }
  });
}

}  // namespace forwardpass::cpu

namespace forwardpass {
namespace {

using namespace cpu;

// A head of a sequence's keys, and with the first of them its channels' scales.
void return_keys(const QuantizeAttentionParams& p, const Operands8bit& o, int64_t sequence, int64_t head) {
  const Keys8bit from = o.keys(sequence, head);
  const Sequence& s = o.sequences()[sequence];
  std::copy_n(from.v_scale, p.value_dim, p.to.v_scale + (sequence * p.kv_heads + head) * p.value_dim);
  for (int64_t key = 0; key < s.keys; ++key) {
    const int64_t to = s.key_token(p, key) * p.kv_heads + head;
    p.to.k_scale[to] = from.k_scale[key], p.to.v_block_scale[to] = from.v_block_scale[key / kBlockKeys];
    for (int64_t c = 0; c < p.head_dim; ++c) p.to.k[to * p.head_dim + c] = from.k_at(o.columns(), key, c);
    for (int64_t c = 0; c < p.value_dim; ++c) p.to.v[to * p.value_dim + c] = from.v_at(o.value_columns(), key, c);
  }
}

void return_rows(const QuantizeAttentionParams& p, const Operands8bit& o, int64_t sequence, int64_t head) {
  const Sequence& s = o.sequences()[sequence];
  const float* centre = o.keys(sequence, head / (p.heads / p.kv_heads)).centre;
  std::vector<float> x(o.row_floats());
  std::vector<int8_t> integers(o.row_floats());
  for (int64_t row = 0; row < s.rows; ++row) {
    const char* q = row_of(p, p.q, s, s.first_row, head, row);
    const int64_t to = s.row_token(p, row) * p.heads + head;
    with_vectors_and_dtype(p.dtype,
                           [&]<class V, Dtype D>(V, std::integral_constant<Dtype, D>) __attribute__((always_inline)) {
                             p.to.q_scale[to] = quantize_row<V, D, 0>(o, q, x.data(), integers.data());
                             p.to.q_shift[to] = shift_of<V, D>(p, q, centre);
                           });
    std::copy_n(integers.data(), p.head_dim, p.to.q + to * p.head_dim);
  }
}

}  // namespace

void quantize_attention_cpu(const QuantizeAttentionParams& p) {
  const Operands8bit o(p, sequences_of(p, p.cu_seqlens_q ? known_sequences(p) : p.batch));
  const int64_t sequences = std::ssize(o.sequences());
  torch::stable::parallel_for(0, sequences * (p.heads + p.kv_heads), 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t sequence = i % sequences, head = i / sequences;
      if (head < p.heads)
        return_rows(p, o, sequence, head);
      else
        return_keys(p, o, sequence, head - p.heads);
    }
  });
}

}  // namespace forwardpass
