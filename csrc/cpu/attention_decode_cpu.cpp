// A few rows against all keys of their sequence: what binds is reading the cache once.
//
// An item is one head of the cache and kSplitKeys keys of a sequence; all query heads that share the head are its rows,
// kMostRows at a time, and of many rows of a sequence kChunkRows. Items leave their sums to a workspace, and a second
// pass adds those of a sequence in order: which keys an item has depends on the sequence alone, so that bits depend
// neither on the number of threads nor on the batch. Threads share the keys, not the items, of which a sequence's last
// may have few: 544 and 2080 keys of 3 heads, float32, two threads: 46 and 130 us where items of 512 keys were counted
// out, 64 and 172. Of 128 keys int8 is slower by a quarter.
//
// Keys and values are read where they lie, as words (words.h), in tiles of kTileKeys (decode_tile.h). While a tile is
// multiplied, the next one is prefetched: rows of one head may be a kilobyte apart, where no hardware does it. Of 8
// bits a tile's heads are taken in turn, and what is prefetched meanwhile is in the order of memory.
//
// Of the bandwidth of a copy, read and written, one core of an EPYC (Zen 4), caches of 128 MiB, 64 and 128 columns,
// 1024 keys, int8 4096 too, in CPU time. One row of one head on each of the cache's: float32 62 to 77 %, bfloat16 72 to
// 77 %, float16 71 to 85 %, int8 67 to 79 % (59 to 68 with a float32 q, whose products are in float32), e4m3 39 to 45
// %. Of 3 or 4 heads: float32 65 to 76 %, bfloat16 69 to 78 %, float16 56 to 79 %, int8 44 to 66 % (36 to 53), e4m3 26
// to 33 %. Tiles of 32 and of 128 keys came no faster.
//
// With 4 heads the products with 64 columns of int8 take 16 clocks a key of the 30 in which 70 % of that bandwidth
// brings it, softmax and sums over lanes as many again. Four products a lane, by vpdpbusd, were no faster: q and
// probabilities have two bytes each, so that instructions are as many, and keys have to be transposed.
#include <algorithm>
#include <numeric>
#include <ranges>
#include <vector>

#include "cpu/attention_decode.h"
#include "cpu/decode_tile.h"
#include "cpu/memory.h"

namespace forwardpass {
namespace cpu {
namespace {

constexpr int64_t kSplitKeys = 256;
constexpr int64_t kLeastWork = 1 << 16;  // of a thread, in products of q and k
// Rows of 8 bits of so many bytes are read together, of several heads: 64 bytes of each of 8 heads came 1.2 to 1.3
// times as fast as head by head, rows of 16 bits no faster.
constexpr int64_t kTogether = 512;

// Rows of a head that are computed together: more of them would not stay in L1 with a tile of keys.
constexpr int64_t kChunkRows = 64;

// Rows of one sequence, and its keys from the first that any of them sees; and what comes before them: parts, keys of
// all heads times rows. lost: the rows are NaN, and no keys are read.
struct Chunk {
  int64_t batch, first_row, rows, begin = 0, end = 0, splits = 1, first_item = 0, first_key = 0;
  bool lost = false;

  Head head(const AttentionDecodeParams& p, int64_t h) const { return {p, batch, h, first_row, rows}; }
};

// Whether the table names a page for each key from begin to end.
bool has_pages(const KvCache& c, int64_t batch, int64_t begin, int64_t end) {
  if (!c.block_table) return true;
  for (int64_t key = begin; key < end; key += c.page - key % c.page)
    if (c.first_of(static_cast<int32_t>(batch), static_cast<int32_t>(key)) < 0) return false;
  return true;
}

// The keys that rows of a sequence see, in a chunk that is not lost.
Chunk chunk_of(const AttentionDecodeParams& p, int64_t batch, int64_t first_row, int64_t rows) {
  Chunk c{.batch = batch, .first_row = first_row, .rows = rows};
  const int64_t place = p.cache.seq_lens[batch] - p.rows + first_row;
  const int64_t first = std::max<int64_t>(p.leftpad ? p.leftpad[batch] : 0, place - p.left);
  c.end = std::max<int64_t>(place + rows, 0);
  c.begin = std::min(std::max<int64_t>(first, 0), c.end);
  return c;
}

// A sequence's rows in chunks. If there is a page missing, each row by itself: others may see keys on both sides of it.
void add_chunks(const AttentionDecodeParams& p, int64_t batch, std::vector<Chunk>& chunks) {
  const int64_t most = std::max<int64_t>(kChunkRows / (p.heads / p.cache.heads), 8);
  if (!p.in_range(batch)) {
    for (int64_t row = 0; row < p.rows; row += most)
      chunks.push_back({.batch = batch, .first_row = row, .rows = std::min(most, p.rows - row), .lost = true});
    return;
  }
  for (int64_t row = 0; row < p.rows; row += most) {
    const Chunk chunk = chunk_of(p, batch, row, std::min(most, p.rows - row));
    if (has_pages(p.cache, batch, chunk.begin, chunk.end)) {
      chunks.push_back(chunk);
      continue;
    }
    for (int64_t i = row; i < row + chunk.rows; ++i) {
      Chunk alone = chunk_of(p, batch, i, 1);
      alone.lost = !has_pages(p.cache, batch, alone.begin, alone.end);
      if (alone.lost) alone.end = alone.begin;
      chunks.push_back(alone);
    }
  }
}

// n floats, n a multiple of the lanes, to elements of words; what these have to be multiplied by. Integers are at most
// `most`; of an infinity or a NaN it is NaN.
template <class A, class V = typename A::V>
INLINE float pack(const float* from, int64_t n, float most, float* to) {
  if constexpr (kIntegers<A>) {
    V largest{}, zeros{};
    for (int64_t i = 0; i < n; i += kLanes<V>) {
      const V x = load<V, Dtype::f32>(from, i);
      largest = max(abs(x), largest), zeros += x * 0;
    }
    const float range = cpu::largest(largest), inverse = range > 0 ? most / range : 0;
    for (int64_t i = 0; i < n; i += kLanes<V>)
      A::store_integers(to_int(load<V, Dtype::f32>(from, i) * inverse, -most, most), to, i);
    return range / most + sum(zeros);
  } else {
    for (int64_t i = 0; i < n; i += kLanes<V>) A::store_probabilities(load<V, Dtype::f32>(from, i), to, i);
    return 1;
  }
}

template <class F>
INLINE void with_arithmetic(const AttentionDecodeParams& p, F f) {
  const Dtype cache = p.cache.dtype;
  with_vectors(VECTOR_CODE {
#if defined(__x86_64__)
    if constexpr (kLanes<V> == 16)
      if (cache == Dtype::bf16 && has_avx512_bf16()) return f(BfloatPairs{});
    if constexpr (kLanes<V> == 16)
      if (cache == Dtype::i8 && p.dtype != Dtype::f32 && tier() >= Tier::avx512_vnni) return f(VnniPairs{});
    if constexpr (kLanes<V> >= 8)  // of 16 bits, float32 has more to tell than integers
      if (cache == Dtype::i8 && p.dtype != Dtype::f32) return f(IntegerPairs<V>{});
#endif
    if (cache == Dtype::i8) return f(Floats<V, Dtype::i8>{});
    if (cache == Dtype::e4m3) return f(Floats<V, Dtype::e4m3>{});
    with_float_dtype(cache, [&](auto dtype) __attribute__((always_inline)) { f(Floats<V, decltype(dtype)::value>{}); });
  });
}

// Calls f with the number of rows, at most kMostRows, as a constant.
template <class F>
INLINE void with_rows(int64_t rows, F f) {
  if (rows == 1) return f(std::integral_constant<int, 1>{});
  if (rows == 2) return f(std::integral_constant<int, 2>{});
  if (rows == 3) return f(std::integral_constant<int, 3>{});
  f(std::integral_constant<int, 4>{});
}

// Memory of a thread that stays, as a step of a small model has tens of calls.
class Scratch {
 public:
  float* get(int64_t floats) {
    if (floats > floats_) lines_ = allocate(4 * floats), floats_ = floats;
    return reinterpret_cast<float*>(lines_.get());
  }

 private:
  CacheLines lines_;
  int64_t floats_ = 0;
};

// What a thread works in.
class Worker {
 public:
  // most_rows: of an item
  Worker(const AttentionDecodeParams& p, int64_t most_rows)
      : p_(p),
        stride_(Sums::floats(most_rows, p.cache.value_dim)),
        columns_(round_up(p.cache.head_dim, kColumnStep)),
        value_columns_(round_up(p.cache.value_dim, kColumnStep)) {
    thread_local Scratch scratch;
    const int64_t heads = most_heads();
    float* zeros;
    float** parts[] = {&q_,
                       &factors_,
                       &row_,
                       &copies_,
                       &sums_,
                       &buffers_.k_scale,
                       &buffers_.v_scale,
                       &buffers_.scores,
                       &buffers_.words,
                       &zeros};
    const int64_t sizes[] = {heads * most_rows * columns_,
                             round_up(heads * most_rows, kMostLanes),
                             columns_,
                             2 * kTileKeys * (columns_ + value_columns_),
                             heads * stride_,
                             kTileKeys,
                             kTileKeys,
                             kMostRows * kTileKeys,
                             kMostRows * kTileKeys,
                             value_columns_};
    float* next = scratch.get(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}));
    for (int i = 0; i < std::ssize(sizes); ++i) *parts[i] = next, next += sizes[i];
    std::fill_n(zeros, value_columns_, 0.0f);
    buffers_.zeros = reinterpret_cast<const char*>(zeros);
  }

  float* own_sums() const { return sums_; }

  // How many heads are taken together: those whose rows are neighbours in memory.
  int64_t most_heads() const {
    const KvCache& c = p_.cache;
    const bool together = size_of(c.dtype) == 1 && c.k.head * c.heads <= c.k.row && c.v.head * c.heads <= c.v.row;
    return together ? std::clamp<int64_t>(kTogether / c.head_dim, 1, c.heads) : 1;
  }

  // Fills in the sums of the rows of `heads` heads, a head's after the other's from `sums` on, of keys of a sequence.
  // What follows is prefetched.
  void run(const Keys& keys, int64_t heads, float* sums, const Keys& following) {
    const auto& [first_head, begin, end] = keys;
    const int64_t row_count = first_head.rows();
    const int64_t size = size_of(p_.cache.dtype), k_bytes = p_.cache.k.head * size, v_bytes = p_.cache.v.head * size;
    for (int64_t h = 0; h < heads; ++h) {
      const Sums s(sums + h * stride_, row_count, p_.cache.value_dim);
      std::fill_n(s.values, row_count * value_columns_, 0.0f);
      std::fill_n(s.maxima, round_up(row_count, kMostRows), -INFINITY);
      std::fill_n(s.totals, round_up(row_count, kMostRows), 0.0f);
      if (begin < end) place_rows(head_behind(first_head, h), h);
    }
    if (begin >= end) return;
    Tile tiles[2];
    tiles[0].find(keys, begin);
    if (copies_rows_) std::fill_n(copies_, 2 * kTileKeys * (columns_ + value_columns_), 0.0f);
    for (int64_t key = begin, t = 0; key < end; key += kTileKeys, t ^= 1) {
      Tile &tile = tiles[t], &next = tiles[t ^ 1];
      if (key + kTileKeys < end)
        next.find(keys, key + kTileKeys);
      else if (following.begin < following.end)
        next.find(following, following.begin);
      else
        next = tile;
      for (int64_t h = 0; h < heads; ++h) {
        const Head head = head_behind(first_head, h);
        if (h) tile.next_head(k_bytes, v_bytes);
        Tile share, copied;
        if (heads > 1) share.find_share(next, h, heads, k_bytes, v_bytes);
        if (copies_rows_) copy_rows(tile, copied);
        place_scales(head, p_.cache.k_scale, tile, buffers_.k_scale);
        place_scales(head, p_.cache.v_scale, tile, buffers_.v_scale);
        for (int64_t first = 0; first < row_count; first += kMostRows) {
          const auto count = static_cast<int>(std::min<int64_t>(row_count - first, kMostRows));
          const Rows rows =
              rows_before(tile, head, h, first, count, Sums(sums + h * stride_, row_count, p_.cache.value_dim));
          if (!rows.see_keys) continue;
          with_rows(count, [&](auto count) __attribute__((always_inline)) {
            with_arithmetic(p_, [&]<class A>(A) __attribute__((always_inline)) {
              attend<A, count()>(p_, copies_rows_ ? copied : tile, heads > 1 ? share : next, rows, buffers_);
            });
          });
        }
      }
    }
  }

 private:
  static Head head_behind(Head head, int64_t h) {
    head.head += h;
    return head;
  }
  // `count` rows from `first` on of a head, number h of those together, before a tile of keys.
  Rows rows_before(const Tile& tile, const Head& head, int64_t h, int64_t first, int count, Sums sums) const {
    sums.values += first * value_columns_, sums.maxima += first, sums.totals += first;
    Rows rows{.q = q_ + (h * head.rows() + first) * words_,
              .factors = factors_ + h * head.rows() + first,
              .words = words_,
              .low = {},
              .high = {},
              .all_low = 0,
              .all_high = kTileKeys,
              .see_keys = false,
              .place = {},
              .slope = {},
              .sums = sums};
    for (int r = 0; r < count; ++r) {
      const int64_t place = p_.cache.seq_lens[head.batch] - p_.rows + head.row_of_sequence(first + r) - tile.key;
      rows.low[r] = static_cast<int>(std::clamp<int64_t>(place - p_.left, 0, kTileKeys));
      rows.high[r] = static_cast<int>(std::clamp<int64_t>(place, -1, tile.n - 1));
      rows.place[r] = static_cast<float>(place), rows.slope[r] = slope_of(head, first + r);
      rows.all_low = std::max(rows.all_low, rows.low[r]), rows.all_high = std::min(rows.all_high, rows.high[r]);
      rows.see_keys |= rows.low[r] <= rows.high[r];
    }
    return rows;
  }
  float slope_of(const Head& head, int64_t row) const {
    if (!p_.alibi_slopes) return 0;
    return p_.alibi_slopes[head.batch * p_.alibi_batch_stride + head.q_head(row)] * kLog2e;
  }
  // The rows of q as words, and what scores have to be multiplied by.
  void place_rows(const Head& head, int64_t index) {
    with_arithmetic(p_, [&]<class A>(A) __attribute__((always_inline)) { place_rows<typename A::Words>(head, index); });
  }
  template <class A>
  INLINE void place_rows(const Head& head, int64_t index) {
    using V = typename A::V;
    constexpr int64_t kStep = kLanes<V> * A::kElements;
    words_ = round_up(p_.cache.head_dim, kStep) / A::kElements;
    const int64_t columns = p_.cache.head_dim, rows = head.rows();
    copies_rows_ = columns % kStep != 0 || p_.cache.value_dim % kStep != 0;
    float most = 0;  // sums of products with int8 are less than 2^31
    if constexpr (kIntegers<A>) most = std::min(A::kMost, static_cast<float>((int64_t{1} << 23) / columns_ - 1));
    std::fill_n(row_, columns_, 0.0f);
    apart<V>(APART_CODE {
      for (int64_t row = 0; row < rows; ++row) {
        const int64_t h = head.q_head(row), i = head.row_of_sequence(row);
        const auto q = static_cast<const char*>(p_.q.data) +
                       (head.batch * p_.q.batch + i * p_.q.row + h * p_.q.head) * size_of(p_.dtype);
        to_floats<V>(q, p_.dtype, columns, row_);
        const float unit = pack<A>(row_, round_up(columns, kStep), most, q_ + (index * rows + row) * words_);
        factors_[index * rows + row] = (p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * kLog2e) * unit;
      }
    });
  }

  void place_scales(const Head& head, const CacheScale& s, const Tile& tile, float* to) const {
    if (s.per_token) {
      head.for_each_run(s, 4, tile.key, tile.n, [&](const char* data, int i, int end) {
        const auto scales = reinterpret_cast<const float*>(data);
        if (s.row == 1)
          std::copy_n(scales, end - i, to + i);
        else
          for (int j = i; j < end; ++j) to[j] = scales[(j - i) * s.row];
      });
    } else {
      std::fill_n(to, tile.n, s.data ? s.data[head.head * s.head] : 1);
    }
    std::fill_n(to + tile.n, kTileKeys - tile.n, 0.0f);  // are multiplied by probabilities of 0
  }

  void copy_rows(const Tile& from, Tile& tile) const {
    tile.key = from.key, tile.n = from.n;
    const int64_t size = size_of(p_.cache.dtype);
    for (int i = 0; i < kTileKeys; ++i) {
      char* const to = reinterpret_cast<char*>(copies_ + i * (columns_ + value_columns_));
      std::memcpy(to, from.k[i], p_.cache.head_dim * size);
      std::memcpy(to + 4 * columns_, from.v[i], p_.cache.value_dim * size);
      tile.k[i] = to, tile.v[i] = to + 4 * columns_;
    }
  }

  const AttentionDecodeParams& p_;
  const int64_t stride_;  // from the sums of one head to those of the next
  const int64_t columns_, value_columns_;
  int64_t words_;     // of a row of q
  bool copies_rows_;  // of the cache, as they are no whole vectors
  float *q_, *factors_, *row_, *copies_, *sums_;
  Buffers buffers_;
};

float sink_of(const AttentionDecodeParams& p, int64_t h) {
  if (!p.sinks) return -INFINITY;
  float sink = 0;
  with_vectors(VECTOR_CODE {
    with_float_dtype(p.sinks_dtype, [&](auto dtype) __attribute__((always_inline)) {
      sink = load<V, decltype(dtype)::value>(p.sinks, h, 1)[0];
    });
  });
  return sink * kLog2e;
}

// The head's rows of the output, and of the lse, from `count` partial sums, `stride` floats apart, which it changes.
void finish(const Head& head, bool lost, float* partial, int64_t count, int64_t stride) {
  const AttentionDecodeParams& p = head.p;
  const int64_t columns = p.cache.value_dim, values = round_up(columns, kColumnStep);
  const auto sums = [&](int64_t s) { return Sums(partial + s * stride, head.rows(), columns); };
  for (int64_t row = 0; row < head.rows(); ++row) {
    const int64_t h = head.q_head(row), i = head.row_of_sequence(row);
    const float sink = sink_of(p, h);
    float maximum = sink;
    for (int64_t s = 0; s < count; ++s) maximum = std::max(maximum, sums(s).maxima[row]);
    const float subtrahend = maximum == -INFINITY ? 0 : maximum;
    float total = std::exp2(sink - subtrahend);
    for (int64_t s = 0; s < count; ++s) {
      float& factor = sums(s).maxima[row];
      factor = std::exp2(factor - subtrahend);
      total += factor * sums(s).totals[row];
    }
    if (lost) total = NAN;
    const float inverse = total == 0 ? 0 : 1 / total;  // a row without keys is 0
    if (p.lse) p.lse[(head.batch * p.heads + h) * p.rows + i] = subtrahend / kLog2e + std::log(total);
    char* out = static_cast<char*>(p.out) + ((head.batch * p.rows + i) * p.heads + h) * columns * size_of(p.dtype);
    with_vectors(VECTOR_CODE {
      with_float_dtype(p.dtype, [&](auto dtype) __attribute__((always_inline)) {
        for_each_vector<V>(
            0, columns, VECTOR_BODY(&) {
              V x{};
              for (int64_t s = 0; s < count; ++s)
                x += load<V, Dtype::f32>(sums(s).values, row * values + c) * sums(s).maxima[row];
              store<decltype(dtype)::value>(x * inverse, out, c, n);
            });
      });
    });
  }
}

// What there is to do, in order: of a sequence after the other the first keys of its heads, then their next ones. The
// parts depend on a sequence's own length alone, so that its bits do. Keys count once for each row of a chunk.
struct Ranges {
  const AttentionDecodeParams& p;
  const int64_t heads;
  std::vector<Chunk> chunks;
  int64_t items = 0, keys = 0, most_splits = 1, most_rows = 1;

  explicit Ranges(const AttentionDecodeParams& p) : p(p), heads(p.cache.heads) {
    chunks.reserve(p.cache.batch);
    for (int64_t b = 0; b < p.cache.batch; ++b) add_chunks(p, b, chunks);
    for (Chunk& c : chunks) {
      c.splits = std::max<int64_t>((c.end - c.begin + kSplitKeys - 1) / kSplitKeys, 1);
      c.first_item = items, c.first_key = keys;
      items += c.splits * heads, keys += (c.end - c.begin) * heads * c.rows;
      most_splits = std::max(most_splits, c.splits), most_rows = std::max(most_rows, c.head(p, 0).rows());
    }
  }

  const Chunk& chunk_of(int64_t item) const {
    return *std::prev(std::upper_bound(chunks.begin(), chunks.end(), item,
                                       [](int64_t item, const Chunk& c) { return item < c.first_item; }));
  }
  Keys keys_of(int64_t item) const {
    const Chunk& c = chunk_of(item);
    const int64_t part = item - c.first_item, key = c.begin + part / heads * kSplitKeys;
    return {c.head(p, part % heads), key, std::min(key + kSplitKeys, c.end)};
  }

  // The first item whose middle has so many keys or more before it.
  int64_t first_behind(int64_t count) const {
    const auto all = std::views::iota(int64_t{0}, items);
    const auto before = [&](int64_t item) {
      const auto [head, begin, end] = keys_of(item);
      const Chunk& c = chunk_of(item);
      const int64_t in_chunk = (begin - c.begin) * heads + (end - begin) * head.head + (end - begin) / 2;
      return c.first_key + in_chunk * c.rows < count;
    };
    return std::ranges::partition_point(all, before) - all.begin();
  }
};

}  // namespace

struct SharedDecode::Parts {
  Ranges ranges;
  int64_t stride, shares;

  Parts(const AttentionDecodeParams& p, int64_t most)
      : ranges(p),
        stride(Sums::floats(ranges.most_rows, p.cache.value_dim)),
        shares(std::clamp<int64_t>(ranges.keys * p.cache.head_dim * (p.heads / p.cache.heads) / kLeastWork, 1, most)) {}
};

SharedDecode::SharedDecode(const AttentionDecodeParams& p, int64_t most)
    : parts_(std::make_unique<const Parts>(p, most)) {}
SharedDecode::~SharedDecode() = default;

int64_t SharedDecode::shares() const { return parts_->shares; }

int64_t SharedDecode::workspace_floats() const {
  return parts_->ranges.most_splits > 1 ? parts_->stride * parts_->ranges.items : 0;
}

void SharedDecode::attend(int64_t first, int64_t last, float* partials) const {
  const auto& [ranges, stride, shares] = *parts_;
  Worker worker(ranges.p, ranges.most_rows);
  const int64_t end = last == shares ? ranges.items : ranges.first_behind(ranges.keys * last / shares);
  for (int64_t item = ranges.first_behind(ranges.keys * first / shares); item < end;) {
    const Keys keys = ranges.keys_of(item);
    const Chunk& chunk = ranges.chunk_of(item);
    const int64_t count = std::min({worker.most_heads(), ranges.heads - keys.head.head, end - item});
    const bool whole = chunk.splits == 1;
    float* const sums = whole ? worker.own_sums() : partials + item * stride;
    item += count;
    worker.run(keys, count, sums, item < end ? ranges.keys_of(item) : keys);
    if (whole)
      for (int64_t h = 0; h < count; ++h)
        finish(chunk.head(ranges.p, keys.head.head + h), chunk.lost, sums + h * stride, 1, 0);
  }
}

int64_t SharedDecode::heads() const {
  return static_cast<int64_t>(parts_->ranges.chunks.size()) * parts_->ranges.heads;
}

void SharedDecode::combine(int64_t first, int64_t last, float* partials) const {
  const auto& [ranges, stride, shares] = *parts_;
  for (int64_t i = first; i < last; ++i) {
    const int64_t head = i % ranges.heads;
    const Chunk& c = ranges.chunks[i / ranges.heads];
    if (c.splits > 1)
      finish(c.head(ranges.p, head), c.lost, partials + (c.first_item + head) * stride, c.splits,
             ranges.heads * stride);
  }
}

}  // namespace cpu

void attention_decode_cpu(const AttentionDecodeParams& p) {
  using namespace cpu;
  const SharedDecode decode(p, torch::stable::get_num_threads());
  thread_local Scratch workspace;
  float* const partials = decode.workspace_floats() ? workspace.get(decode.workspace_floats()) : nullptr;
  torch::stable::parallel_for(0, decode.shares(), 1,
                              [&](int64_t first, int64_t last) { decode.attend(first, last, partials); });
  if (!partials) return;
  torch::stable::parallel_for(0, decode.heads(), 4,
                              [&](int64_t first, int64_t last) { decode.combine(first, last, partials); });
}

}  // namespace forwardpass
