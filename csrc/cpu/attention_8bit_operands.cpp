#include "cpu/attention_8bit_operands.h"

#include "torch/check.h"

namespace forwardpass::cpu {
namespace {

constexpr int64_t kChunkBlocks = 8;  // that a thread quantises at a time

const char* row_of(const AttentionParams& p, const AttentionTensor& t, const Sequence& s, int64_t head, int64_t key) {
  return static_cast<const char*>(t.data) +
         (s.batch * t.batch + (s.first_key + key) * t.row + head * t.head) * size_of(p.dtype);
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
    const char* k = row_of(p, p.k, s, head, i * (s.keys - 1) / std::max<int64_t>(samples - 1, 1));
    for_each_vector<V>(
        0, p.head_dim,
        VECTOR_BODY(&) { store<Dtype::f32>(load<V, Dtype::f32>(centre, c, n) + load<V, D>(k, c, n), centre, c, n); });
  }
  for_each_vector<V>(
      0, p.head_dim, VECTOR_BODY(&) { store<Dtype::f32>(load<V, Dtype::f32>(centre, c, n) * share, centre, c, n); });
}

// Of each channel of v the largest magnitude of all keys, NaN where one is NaN or infinite.
template <class V, Dtype D>
INLINE void find_v_range(const AttentionParams& p, const Sequence& s, int64_t head, int64_t value_columns,
                         float* v_range) {
  std::fill_n(v_range, value_columns, 0.0f);
  const auto highs = reinterpret_cast<uint32_t*>(v_range);
  for (int64_t key = 0; key < s.keys; ++key) {
    const char* v = row_of(p, p.v, s, head, key);
    for_each_vector<V>(
        0, p.value_dim, VECTOR_BODY(&) {
          store_bits(max(load_bits<Uints<V>>(highs + c, n), bits<Uints<V>>(load<V, D>(v, c, n)) & 0x7fffffff),
                     highs + c, n);
        });
  }
  for (int64_t c = 0; c < p.value_dim; ++c)
    if (!(v_range[c] < INFINITY)) v_range[c] = NAN;
}

// A block of k, from its key on.
template <class V, Dtype D>
INLINE void pack_k(const Operands8bit& o, const Sequence& s, int64_t head, int64_t block, const Keys8bit& to, float* x,
                   int8_t* integers) {
  const AttentionParams& p = o.params();
  int8_t* panel = to.k + block * kBlockKeys * o.columns();
  const float unrotate = 1 / static_cast<float>(o.rotated());
  for (int64_t i = 0; i < kBlockKeys; ++i) {
    const int64_t key = block * kBlockKeys + i;
    if (key < s.keys) {
      to.k_scale[key] = quantize_row<V, D, 0>(o, row_of(p, p.k, s, head, key), to.centre, x, integers) * unrotate;
    } else {
      to.k_scale[key] = 0;
      std::fill_n(integers, o.columns(), int8_t{0});
    }
    Ints<V> sums{};
    for (int64_t c = 0; c < o.columns(); c += kLanes<V>)  // `integers` has whole vectors, zero behind the columns
      sums += widen<Ints<V>>(load_bits<Chars<V>>(integers + c, kLanes<V>));
    to.corrections[key] = -128 * sum(sums);
    for (int64_t c = 0; c < o.columns(); c += 4) std::memcpy(panel + c * kPanelColumns + 4 * i, integers + c, 4);
  }
}

// A block of v.
template <class V, Dtype D>
INLINE void pack_v(const Operands8bit& o, const Sequence& s, int64_t head, int64_t block, const Keys8bit& to,
                   const float* inverse) {
  const AttentionParams& p = o.params();
  int8_t* panels = to.v + block * kBlockKeys * o.value_columns();
  for (int64_t i = 0; i < kBlockKeys; i += 4) {
    const int64_t key = block * kBlockKeys + i;
    for_each_vector<V>(
        0, p.value_dim, VECTOR_BODY(&) {
          Ints<V> four{};
          for (int64_t j = 0; j < 4 && key + j < s.keys; ++j) {
            const V x = load<V, D>(row_of(p, p.v, s, head, key + j), c, n) * load<V, Dtype::f32>(inverse, c);
            four |= (to_int(x, -127, 127) & 255) << static_cast<int>(8 * j);
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

Operands8bit::Operands8bit(const AttentionParams& p, bool rotates, std::vector<Sequence> sequences)
    : p_(p),
      sequences_(std::move(sequences)),
      columns_(whole(p.head_dim, 4)),
      panels_(whole(p.value_dim, kPanelColumns) / kPanelColumns),
      rotated_(rotates ? p.head_dim & -p.head_dim : 1) {
  int64_t blocks = 0;
  for (const Sequence& s : sequences_) offsets_.push_back(blocks), blocks += s.blocks();
  const int64_t keys = blocks * kBlockKeys * p.kv_heads, heads = std::ssize(sequences_) * p.kv_heads;
  k_ = allocate(keys * columns_ + 1), v_ = allocate(keys * value_columns() + 1);
  k_scale_ = allocate(4 * keys + 1), corrections_ = allocate(4 * keys + 1);
  v_range_ = allocate(4 * heads * value_columns() + 1), centre_ = allocate(4 * heads * row_floats() + 1);
  find_ranges();
  quantize();
}

Keys8bit Operands8bit::keys(int64_t sequence, int64_t kv_head) const {
  const int64_t key = (offsets_[sequence] * p_.kv_heads + sequences_[sequence].blocks() * kv_head) * kBlockKeys,
                head = sequence * p_.kv_heads + kv_head;
  return {.k = at<int8_t>(k_, key * columns_),
          .k_scale = at<float>(k_scale_, key),
          .corrections = at<int32_t>(corrections_, key),
          .v = at<int8_t>(v_, key * value_columns()),
          .v_range = at<float>(v_range_, head * value_columns()),
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
                               find_v_range<V, D>(p_, s, head, value_columns(), to.v_range);
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
    std::vector<float> row(row_floats()), inverse(value_columns());
    std::vector<int8_t> integers(row_floats());
    with_vectors_and_dtype(p_.dtype,
                           [&]<class V, Dtype D>(V, std::integral_constant<Dtype, D>) __attribute__((always_inline)) {
                             for (int64_t i = begin; i < end; ++i) {
                               const auto [s, head, first, last] = items[i];
                               const Keys8bit to = keys(s, head);
                               for (int64_t c = 0; c < value_columns(); ++c) inverse[c] = inverse_of(to.v_range[c]);
                               for (int64_t block = first; block < last; ++block) {
                                 pack_k<V, D>(*this, sequences_[s], head, block, to, row.data(), integers.data());
                                 pack_v<V, D>(*this, sequences_[s], head, block, to, inverse.data());
                               }
                             }
                           });
  });
}

}  // namespace forwardpass::cpu
