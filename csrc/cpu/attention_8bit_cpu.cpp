// k and v in 8 bits first, for all heads; then chunks of rows, a block of 64 keys after the other against tiles of
// rows.
//
// Both products are of unsigned bytes by signed ones (byte_products.h, byte_tiles.h): q + 128 by k, with a correction
// for each key, and probabilities by v. A block's probabilities are in units of its own largest, so they become
// integers before the row's maximum is known, and each tile has one pass over its scores. The sums of the products with
// v are added to the row's output with the weight of the block: the pass that rescales it to a new maximum is the same.
#include "cpu/activation.h"
#include "cpu/attention_8bit.h"
#include "cpu/attention_8bit_operands.h"
#include "cpu/byte_tiles.h"
#include "cpu/sequences.h"
#include "torch/check.h"

namespace forwardpass {
namespace cpu {
namespace {

constexpr int64_t kChunk = 96, kShortChunk = 24;  // rows, a multiple of those of a tile; short ones not of AMX's
constexpr int kMostRows = 16;                     // of a tile
constexpr float k255th = 1 / 255.0f;

// Some rows of a head of a sequence.
struct Chunk {
  int64_t sequence, head, first, rows;
};

// What is the same for all rows of a chunk.
struct Head {
  const Attention8bitParams& p;
  const Operands8bit& operands;
  const Sequence& sequence;
  const Chunk& chunk;
  const Keys8bit keys;
  const float slope, sink;  // in units of log(e)
  const bool modifies;      // scores are more than products

  Head(const Operands8bit& o, const Chunk& c)
      : p(o.params()),
        operands(o),
        sequence(o.sequences()[c.sequence]),
        chunk(c),
        keys(o.keys(c.sequence, c.head / (p.heads / p.kv_heads))),
        slope(p.alibi_slopes ? p.alibi_slopes[batch() * p.alibi_batch_stride + c.head] : 0),
        sink(p.sinks ? float_at(p.sinks, c.head, p.sinks_dtype) : -INFINITY),
        modifies(p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none) {}

  // Of packed sequences too.
  int64_t batch() const { return p.cu_seqlens_q ? chunk.sequence : sequence.batch; }
  // Where a row of the chunk stands among the keys.
  int64_t position(int64_t row) const { return chunk.first + row + sequence.keys - sequence.rows; }
  // What k's centre adds to all scores of a row, of its product with q: nothing, where each score has it already.
  float shift(float of_row) const { return p.softcap > 0 ? 0 : of_row; }
};

// A chunk's rows: q, and what they have between blocks.
struct Rows {
  uint8_t* q;               // + 128, rows q_stride bytes apart
  float *factors, *shifts;  // of their integer scores; what k's centre adds
  float* totals;            // kMostLanes of each row
  float* out;               // rows out_stride apart
  float* row;               // room for one
  float* maxima;            // so far, in units of log2; with room for a vector from the last on
  int64_t q_stride, out_stride;
};

// A block of keys, and a tile of rows.
struct Tile {
  int64_t first_key, keys, first_row;
  int rows;
  alignas(64) int32_t integers[kMostRows][kBlockKeys];  // and in their place the scores
  alignas(64) float mask[kMostRows][kBlockKeys];
  alignas(64) uint8_t probabilities[kMostRows][kBlockKeys];
  alignas(64) float units[kMostLanes];            // the largest score
  alignas(64) float sums[kMostRows][kMostLanes];  // of probabilities in 255ths, by lanes
  alignas(64) float rescale[kMostLanes], weight[kMostLanes];
};

template <class V>
constexpr int64_t kVectors = kBlockKeys / kLanes<V>;
template <class V>
INLINE int64_t vectors(int64_t n) {
  return (n + kLanes<V> - 1) / kLanes<V>;
}

template <class V>
INLINE V tanh(V x) {
  const V e = exp2_negative(abs(x) * (-2 * kLog2e)), y = (1 - e) / (1 + e);
  return select_less(x, V{}, -y, y);
}

// -inf where a key is not attended to.
template <class V, Dtype D>
INLINE V additive(const void* mask, int64_t i, int n) {
  const V m = load<V, D>(mask, i, n);
  return select_less(m * kLog2e, splat<V>(-3.40282347e38f), splat<V>(-INFINITY), m);
}
template <class V>
INLINE V visible(const void* mask, int64_t i, int n) {
  const Ints<V> m = widen<Ints<V>>(load_bits<Bytes<V>>(static_cast<const uint8_t*>(mask) + i, n));
  return m == 0 ? splat<V>(-INFINITY) : V{};
}

INLINE int64_t element_bytes(const AttentionMask& m) {
  return m.kind == AttentionMaskKind::boolean ? 1 : m.kind == AttentionMaskKind::f32 ? 4 : 2;
}

// The mask of a row from a key on, `n` of them.
template <class V>
INLINE void copy_mask(const AttentionParams& p, const char* from, int64_t n, float* to) {
  const AttentionMask& m = p.mask;
  const int64_t size = element_bytes(m);
  alignas(64) char apart[4 * kBlockKeys];
  if (m.column != 1) {
    for (int64_t i = 0; i < n; ++i) std::memcpy(apart + i * size, from + i * m.column * size, size);
    from = apart;
  }
  for_each_vector<V>(
      0, n, VECTOR_BODY(&) {
        V v;
        if (m.kind == AttentionMaskKind::boolean)
          v = visible<V>(from, c, n);
        else if (m.kind == AttentionMaskKind::f32)
          v = additive<V, Dtype::f32>(from, c, n);
        else if (m.kind == AttentionMaskKind::f16)
          v = additive<V, Dtype::f16>(from, c, n);
        else
          v = additive<V, Dtype::bf16>(from, c, n);
        store<Dtype::f32>(v, to, c);
      });
}

// The masks of a tile's rows; rows that share one, all of it.
template <class V>
INLINE void copy_masks(const Head& h, Tile& t) {
  const AttentionMask& m = h.p.mask;
  const int64_t size = element_bytes(m);
  const char* from =
      static_cast<const char*>(m.data) + (h.sequence.batch * m.batch + h.chunk.head * m.head +
                                          (h.chunk.first + t.first_row) * m.row + t.first_key * m.column) *
                                             size;
  for (int r = 0; r < t.rows; ++r) {
    if (r > 0 && m.row == 0)
      std::memcpy(t.mask[r], t.mask[0], sizeof(t.mask[0]));
    else
      copy_mask<V>(h.p, from + r * m.row * size, t.keys, t.mask[r]);
  }
}

// Scores as options change them, of keys from `distance` on, seen from the row.
template <class V>
INLINE V modified(const Head& h, V s, float shift, int64_t distance, const float* mask) {
  if (h.p.softcap > 0) s = h.p.softcap * tanh((s + shift) / h.p.softcap);
  if (h.p.alibi_slopes) s -= h.slope * abs(__builtin_convertvector(lane_numbers<V>() + static_cast<int>(distance), V));
  if (h.p.mask.kind != AttentionMaskKind::none) s += load<V, Dtype::f32>(mask, 0);
  return s * kLog2e;
}

// The scores of a row of the tile in units of log2, -inf where it does not attend to a key; the largest.
template <class V>
INLINE float scores(const Head& h, const Rows& rows, Tile& t, int r) {
  const int64_t row = t.first_row + r, position = h.position(row) - t.first_key;
  const int low = static_cast<int>(std::max<int64_t>(position - h.p.left, 0)),
            high = static_cast<int>(std::min(position + h.p.right, t.keys - 1));
  const bool sees_all = low == 0 && high == kBlockKeys - 1;
  const float factor = rows.factors[row], shift = rows.shifts[row];
  const float* k_scale = h.keys.k_scale + t.first_key;
  V largest = splat<V>(-INFINITY);
  const auto each = [&](auto change) __attribute__((always_inline)) {
    for (int c = 0; c < t.keys; c += kLanes<V>) {
      const V s = change(load<V, Dtype::i32>(t.integers[r], c) * load<V, Dtype::f32>(k_scale, c) * factor, c);
      store<Dtype::f32>(s, t.integers[r], c);
      largest = max(s, largest);
    }
  };
  if (!h.modifies && sees_all) {
    each([](V s, int) __attribute__((always_inline)) { return s; });
  } else {
    each([&](V s, int c) __attribute__((always_inline)) {
      if (h.modifies) s = modified(h, s, shift, c - position, t.mask[r] + c);
      return sees_all ? s : between(lane_numbers<V>() + c, low, high, s, -INFINITY);
    });
  }
  return cpu::largest(largest);
}

// A row's probabilities as whole 255ths of the largest; zeros from the last key to `depth`.
template <class V>
INLINE void probabilities(Tile& t, int r, int64_t depth) {
  const float unit = t.units[r] == -INFINITY ? 0 : t.units[r];
  V sums{};
  int64_t c = 0;
  for (; c < t.keys; c += kLanes<V>) {
    const V score = load<V, Dtype::f32>(t.integers[r], c);
    const V p =
        exp2_negative(score - unit, [](V x) __attribute__((always_inline)) {  // in 255ths, to 2^-18.4; exact at 0
          return polynomial(x, 1.2218138f, 7.12806892f, 30.6307259f, 88.3733368f, 127.5f);
        });
    sums += p;
    store_low_bytes<V>(bits<Ints<V>>(p + 0x1.8p23f), t.probabilities[r] + c);
  }
  for (; c < depth; c += kLanes<V>) store_low_bytes<V>(Ints<V>{}, t.probabilities[r] + c);
  store<Dtype::f32>(sums, t.sums[r], 0);
}

// The rows' new maxima, and what their outputs and this block's sums have to be multiplied by.
template <class V>
INLINE void weigh(const Rows& rows, Tile& t) {
  const V unit = load<V, Dtype::f32>(t.units, 0), before = load<V, Dtype::f32>(rows.maxima + t.first_row, 0);
  const V maximum = max(unit, before), finite = maximum == -INFINITY ? V{} : maximum;
  store<Dtype::f32>(exp2_negative(before - finite), t.rescale, 0);
  store<Dtype::f32>(exp2_negative(unit - finite), t.weight, 0);
  store<Dtype::f32>(maximum, rows.maxima + t.first_row, 0);
  for (int r = 0; r < t.rows; ++r) {
    float* total = rows.totals + (t.first_row + r) * kMostLanes;
    const V sums = load<V, Dtype::f32>(t.sums[r], 0) * (t.weight[r] * k255th);
    store<Dtype::f32>(load<V, Dtype::f32>(total, 0) * t.rescale[r] + sums, total, 0);
  }
}

// The probabilities of a tile's rows, with zeros from the last key to `depth`; and what outputs are multiplied by.
template <class V>
INLINE void softmax(const Head& h, const Rows& rows, Tile& t, int64_t depth) {
  apart<V>(APART_CODE {
    if (h.p.mask.kind != AttentionMaskKind::none) copy_masks<V>(h, t);
    // All maxima first, as exponentials wait for theirs.
    store<Dtype::f32>(splat<V>(-INFINITY), t.units, 0);
    for (int r = 0; r < t.rows; ++r) t.units[r] = scores<V>(h, rows, t, r);
    for (int r = 0; r < t.rows; ++r) probabilities<V>(t, r, depth);
    weigh<V>(rows, t);
  });
}

// A tile's rows against a block of keys.
template <class V, class A>
INLINE void attend(const Head& h, const Rows& rows, Tile& t) {
  const int64_t first = h.position(t.first_row), last = first + t.rows - 1;
  if (last + h.p.right < t.first_key || first - h.p.left >= t.first_key + kBlockKeys) return;
  t.keys = std::min({kBlockKeys, h.sequence.keys - t.first_key, last + h.p.right + 1 - t.first_key});
  const int64_t columns = h.operands.columns(), value_columns = h.operands.value_columns();
  const int32_t* corrections = h.keys.corrections + t.first_key;
  multiply_bytes<A>(
      rows.q + t.first_row * rows.q_stride, rows.q_stride, t.rows, h.keys.k + t.first_key * columns, kPanelRow, columns,
      vectors<V>(t.keys),
      [&](int64_t v)
          __attribute__((always_inline)) { return load_bits<Ints<V>>(corrections + v * kLanes<V>, kLanes<V>); },
      [&](int64_t r, int64_t v, auto sums)
          __attribute__((always_inline)) { store_bits(sums, t.integers[r] + v * kLanes<V>, kLanes<V>); });
  const int64_t depth = whole(t.keys, A::kDepth);
  softmax<V>(h, rows, t, depth);
  const float unit = h.keys.v_block_scale[t.first_key / kBlockKeys] * k255th;
  for (int64_t c = 0; c < h.p.value_dim; c += kPanelColumns) {
    float* out = rows.out + t.first_row * rows.out_stride + c;
    multiply_bytes<A>(
        t.probabilities[0], kBlockKeys, t.rows, h.keys.v + t.first_key * value_columns + c * kBlockKeys, kPanelRow,
        depth, vectors<V>(std::min(kPanelColumns, h.p.value_dim - c)),
        [](int64_t) __attribute__((always_inline)) { return Ints<V>{}; },
        [&](int64_t r, int64_t v, auto sums) __attribute__((always_inline)) {
          float* to = out + r * rows.out_stride + v * kLanes<V>;
          const V added = __builtin_convertvector(sums, V) * (t.weight[r] * unit);
          store<Dtype::f32>(load<V, Dtype::f32>(to, 0) * t.rescale[r] + added, to, 0);
        });
  }
}

// Quantises a chunk's rows of q, and sets what they begin with.
template <class V, Dtype D>
INLINE void begin(const Head& h, const Rows& rows) {
  const Attention8bitParams& p = h.p;
  const Sequence& s = h.sequence;
  for (int64_t i = 0; i < h.chunk.rows; ++i) {
    uint8_t* integers = rows.q + i * rows.q_stride;
    float scale, shift;
    if (p.quantized.q) {
      const int64_t row = s.row_token(p, h.chunk.first + i) * p.heads + h.chunk.head;
      scale = p.quantized.q_scale[row], shift = p.quantized.q_shift[row];
      std::fill_n(integers, rows.q_stride, uint8_t{128});
      for (int64_t c = 0; c < p.head_dim; ++c)
        integers[c] = static_cast<uint8_t>(p.quantized.q[row * p.head_dim + c] + 128);
    } else {
      const char* q = row_of(p, p.q, s, s.first_row, h.chunk.head, h.chunk.first + i);
      shift = shift_of<V, D>(p, q, h.keys.centre);
      scale = quantize_row<V, D, 128>(h.operands, q, rows.row, integers);
    }
    rows.factors[i] = scale * p.scale * (h.modifies ? 1 : kLog2e);
    rows.shifts[i] = shift * p.scale;
    const float sink = p.sinks ? h.sink - h.shift(rows.shifts[i]) : -INFINITY;
    rows.maxima[i] = std::isnan(sink) ? -INFINITY : sink * kLog2e;
    std::fill_n(rows.totals + i * kMostLanes, kMostLanes, 0.0f);
    if (sink != -INFINITY) rows.totals[i * kMostLanes] = std::isnan(sink) ? sink : 1;
    std::fill_n(rows.out + i * rows.out_stride, rows.out_stride, 0.0f);
  }
}

// Divides a chunk's rows by their totals.
template <class V, Dtype D>
INLINE void finish(const Head& h, const Rows& rows) {
  const AttentionParams& p = h.p;
  const Sequence& s = h.sequence;
  const int64_t first = s.first_row + h.chunk.first, row = int64_t{p.heads} * p.value_dim;
  char* out = static_cast<char*>(p.out) +
              (s.batch * p.rows * row + first * row + h.chunk.head * int64_t{p.value_dim}) * size_of(D);
  float* lse = p.lse ? p.lse + (s.batch * p.heads + h.chunk.head) * p.rows + first : nullptr;
  for (int64_t i = 0; i < h.chunk.rows; ++i, out += row * size_of(D)) {
    const float total = sum(load<Vectors<4>::f32, Dtype::f32>(rows.totals + i * kMostLanes, 0)) +
                        sum(load<Vectors<4>::f32, Dtype::f32>(rows.totals + i * kMostLanes, 4)) +
                        (sum(load<Vectors<4>::f32, Dtype::f32>(rows.totals + i * kMostLanes, 8)) +
                         sum(load<Vectors<4>::f32, Dtype::f32>(rows.totals + i * kMostLanes, 12)));
    const float* from = rows.out + i * rows.out_stride;
    for_each_vector<V>(
        0, p.value_dim, VECTOR_BODY(&) {
          const V scaled = load<V, Dtype::f32>(from, c) / total * load<V, Dtype::f32>(h.keys.v_scale, c);
          store<D>(total == 0 ? V{} : scaled, out, c, n);
        });
    if (lse) lse[i] = total == 0 ? -INFINITY : rows.maxima[i] / kLog2e + h.shift(rows.shifts[i]) + std::log(total);
  }
}

template <class V>
INLINE void begin_rows(const Head& h, const Rows& rows) {
  apart<V>(APART_CODE {
    with_float_dtype(h.p.dtype, [&](auto d) __attribute__((always_inline)) { begin<V, decltype(d)::value>(h, rows); });
  });
}
template <class V>
INLINE void finish_rows(const Head& h, const Rows& rows) {
  apart<V>(APART_CODE {
    with_float_dtype(h.p.dtype, [&](auto d) __attribute__((always_inline)) { finish<V, decltype(d)::value>(h, rows); });
  });
}

template <class V, class A>
INLINE void run(const Head& h, const Rows& rows, Tile& t) {
  const typename A::Setup setup(h.operands.columns());
  begin_rows<V>(h, rows);
  const int64_t first = h.position(0), end = std::min(h.sequence.keys, first + h.chunk.rows + h.p.right);
  for (t.first_key = std::max<int64_t>(0, first - h.p.left) / kBlockKeys * kBlockKeys; t.first_key < end;
       t.first_key += kBlockKeys)
    for (t.first_row = 0; t.first_row < h.chunk.rows; t.first_row += A::kRows) {
      t.rows = static_cast<int>(std::min<int64_t>(A::kRows, h.chunk.rows - t.first_row));
      attend<V, A>(h, rows, t);
    }
  finish_rows<V>(h, rows);
}

std::vector<Chunk> chunks_of(const AttentionParams& p, const std::vector<Sequence>& sequences) {
  int64_t whole_chunks = 0;
  for (const Sequence& s : sequences) whole_chunks += (s.rows + kChunk - 1) / kChunk * p.heads;
  const int64_t step = whole_chunks < 16 ? kShortChunk : kChunk;  // so that threads share a head
  std::vector<Chunk> chunks;
  for (int64_t s = 0; s < std::ssize(sequences); ++s)
    for (int64_t head = 0; head < p.heads; ++head)
      for (int64_t row = 0; row < sequences[s].rows; row += step)
        chunks.push_back({s, head, row, std::min(step, sequences[s].rows - row)});
  return chunks;
}

}  // namespace
}  // namespace cpu

void attention_8bit_cpu(const Attention8bitParams& p) {
  using namespace cpu;
  const int64_t known = p.cu_seqlens_q ? known_sequences(p) : p.batch;
  if (p.cu_seqlens_q) fill_unknown(p, known);
  const Operands8bit operands(p, sequences_of(p, known));
  const std::vector<Chunk> chunks = chunks_of(p, operands.sequences());
  torch::stable::parallel_for(0, std::ssize(chunks), 1, [&](int64_t first, int64_t last) {
    const int64_t q_stride = operands.row_floats(), out_stride = whole(p.value_dim, kMostLanes);
    const CacheLines q = allocate(kChunk * q_stride), tile = allocate(sizeof(Tile));
    const CacheLines floats = allocate(4 * (kChunk * (3 + kMostLanes + out_stride) + kMostLanes + q_stride));
    const auto next = reinterpret_cast<float*>(floats[0].bytes);
    const Rows rows{.q = q[0].bytes,
                    .factors = next,
                    .shifts = next + kChunk,
                    .totals = next + 2 * kChunk,
                    .out = next + (2 + kMostLanes) * kChunk,
                    .row = next + (2 + kMostLanes + out_stride) * kChunk,
                    .maxima = next + (2 + kMostLanes + out_stride) * kChunk + q_stride,
                    .q_stride = q_stride,
                    .out_stride = out_stride};
    std::fill_n(rows.row, q_stride, 0.0f);
    with_vectors(VECTOR_CODE {
      with_byte_products<V>([&]<class A>(A) __attribute__((always_inline)) {
        for (int64_t i = first; i < last; ++i)
          run<V, A>(Head(operands, chunks[i]), rows, *reinterpret_cast<Tile*>(tile[0].bytes));
      });
    });
  });
}

}  // namespace forwardpass
