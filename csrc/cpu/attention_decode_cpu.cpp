// A few rows against all keys of their sequence: what binds is reading the cache once.
//
// An item is one head of the cache and kSplitKeys keys of a sequence; all query heads that share the head are its rows,
// kMostRows at a time. Items leave their sums to a workspace, and a second pass adds those of a sequence in order:
// which keys an item has depends on the sequence alone, so that bits depend neither on the number of threads nor on the
// batch. Threads share the keys, not the items, of which a sequence's last may have few: 544 and 2080 keys of 3 heads,
// float32, two threads: 46 and 130 us where items of 512 keys were counted out, 64 and 172. Of 128 keys int8 is slower
// by a quarter.
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

// Keys of one sequence, from the first that any of its rows sees; and what comes before them: parts, keys of all heads.
// lost: a bit for each row that is NaN, whose keys are not read.
struct Sequence {
  int64_t begin, end, splits, first_item, first_key;
  uint32_t lost;
};

// Whether the table names a page for each key from begin to end.
bool has_pages(const KvCache& c, int64_t batch, int64_t begin, int64_t end) {
  if (!c.block_table) return true;
  for (int64_t key = begin; key < end; key += c.page - key % c.page)
    if (c.first_of(static_cast<int32_t>(batch), static_cast<int32_t>(key)) < 0) return false;
  return true;
}

// Its begin, end and lost. A page is longer than rows are apart, so that no page is missing between those of rows that
// are not lost.
Sequence find_keys(const AttentionDecodeParams& p, int64_t batch) {
  Sequence s{};
  if (!p.in_range(batch)) return s.lost = ~0u, s;
  const int64_t length = p.cache.seq_lens[batch], first = std::min<int64_t>(p.first_key(batch), length);
  s.begin = first, s.end = length;
  if (has_pages(p.cache, batch, first, length)) return s;
  s.begin = s.end = first;
  for (int64_t i = 0; i < p.rows; ++i) {
    const int64_t end = length - p.rows + i + 1, begin = std::max(first, end - 1 - p.left);
    if (begin >= end) continue;
    if (!has_pages(p.cache, batch, begin, end))
      s.lost |= 1u << i;
    else
      s.begin = s.begin == s.end ? begin : s.begin, s.end = end;
  }
  return s;
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
  explicit Worker(const AttentionDecodeParams& p)
      : p_(p), rows_(Head{p, 0, 0}.rows()), columns_(round_up(p.cache.head_dim, kColumnStep)) {
    thread_local Scratch scratch;
    const int64_t heads = most_heads();
    float** parts[] = {&q_,
                       &factors_,
                       &row_,
                       &copies_,
                       &sums_,
                       &buffers_.k_scale,
                       &buffers_.v_scale,
                       &buffers_.scores,
                       &buffers_.words};
    const int64_t sizes[] = {heads * rows_ * columns_,
                             round_up(heads * rows_, kMostLanes),
                             columns_,
                             4 * kTileKeys * columns_,
                             heads * Sums::floats(rows_, p.cache.head_dim),
                             kTileKeys,
                             kTileKeys,
                             kMostRows * kTileKeys,
                             kMostRows * kTileKeys};
    float* next = scratch.get(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}));
    for (int i = 0; i < 9; ++i) *parts[i] = next, next += sizes[i];
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
    const int64_t length = p_.cache.seq_lens[first_head.batch];
    const int64_t stride = Sums::floats(rows_, p_.cache.head_dim);
    const int64_t size = size_of(p_.cache.dtype), k_bytes = p_.cache.k.head * size, v_bytes = p_.cache.v.head * size;
    for (int64_t h = 0; h < heads; ++h) {
      const Sums s(sums + h * stride, rows_, p_.cache.head_dim);
      std::fill_n(s.values, rows_ * columns_, 0.0f);
      std::fill_n(s.maxima, round_up(rows_, kMostRows), -INFINITY);
      std::fill_n(s.totals, round_up(rows_, kMostRows), 0.0f);
      if (begin < end) place_rows({p_, first_head.batch, first_head.head + h}, h);
    }
    if (begin >= end) return;
    Tile tiles[2];
    tiles[0].find(keys, begin);
    if (copies_rows_) std::fill_n(copies_, 4 * kTileKeys * columns_, 0.0f);
    for (int64_t key = begin, t = 0; key < end; key += kTileKeys, t ^= 1) {
      Tile &tile = tiles[t], &next = tiles[t ^ 1];
      if (key + kTileKeys < end)
        next.find(keys, key + kTileKeys);
      else if (following.begin < following.end)
        next.find(following, following.begin);
      else
        next = tile;
      for (int64_t h = 0; h < heads; ++h) {
        const Head head{p_, first_head.batch, first_head.head + h};
        if (h) tile.next_head(k_bytes, v_bytes);
        Tile share, copied;
        if (heads > 1) share.find_share(next, h, heads, k_bytes, v_bytes);
        if (copies_rows_) copy_rows(tile, copied);
        place_scales(head, p_.cache.k_scale, tile, buffers_.k_scale);
        place_scales(head, p_.cache.v_scale, tile, buffers_.v_scale);
        for (int64_t first = 0; first < rows_; first += kMostRows) {
          Rows rows{q_ + (h * rows_ + first) * words_,
                    factors_ + h * rows_ + first,
                    words_,
                    {},
                    {},
                    Sums(sums + h * stride, rows_, p_.cache.head_dim)};
          const auto count = static_cast<int>(std::min<int64_t>(rows_ - first, kMostRows));
          rows.sums.values += first * columns_, rows.sums.maxima += first, rows.sums.totals += first;
          for (int r = 0; r < count; ++r) {
            const int64_t place = length - p_.rows + (first + r) % p_.rows - key;
            rows.low[r] = static_cast<int>(std::clamp<int64_t>(place - p_.left, 0, kTileKeys));
            rows.high[r] = static_cast<int>(std::clamp<int64_t>(place, -1, tile.n - 1));
          }
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
  // The rows of q as words, and what scores have to be multiplied by.
  void place_rows(const Head& head, int64_t index) {
    with_arithmetic(p_, [&]<class A>(A) __attribute__((always_inline)) { place_rows<A>(head, index); });
  }
  template <class A>
  INLINE void place_rows(const Head& head, int64_t index) {
    using V = typename A::V;
    constexpr int64_t kStep = kLanes<V> * A::kElements;
    words_ = round_up(p_.cache.head_dim, kStep) / A::kElements;
    const int64_t columns = p_.cache.head_dim;
    copies_rows_ = columns % kStep != 0;
    float most = 0;  // sums of products with int8 are less than 2^31
    if constexpr (kIntegers<A>) most = std::min(A::kMost, static_cast<float>((int64_t{1} << 23) / columns_ - 1));
    std::fill_n(row_, columns_, 0.0f);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t h = head.head * (rows_ / p_.rows) + row / p_.rows, i = row % p_.rows;
      const auto q = static_cast<const char*>(p_.q.data) +
                     (head.batch * p_.q.batch + i * p_.q.row + h * p_.q.head) * size_of(p_.dtype);
      with_float_dtype(p_.dtype, [&](auto dtype) __attribute__((always_inline)) {
        for_each_vector<V>(
            0, columns, VECTOR_BODY(&) { store<Dtype::f32>(load<V, decltype(dtype)::value>(q, c, n), row_, c, n); });
      });
      const float unit = pack<A>(row_, round_up(columns, kStep), most, q_ + (index * rows_ + row) * words_);
      factors_[index * rows_ + row] = (p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * kLog2e) * unit;
    }
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
    const int64_t bytes = p_.cache.head_dim * size_of(p_.cache.dtype);
    for (int i = 0; i < kTileKeys; ++i) {
      char* const to = reinterpret_cast<char*>(copies_ + i * 2 * columns_);
      std::memcpy(to, from.k[i], bytes), std::memcpy(to + 4 * columns_, from.v[i], bytes);
      tile.k[i] = to, tile.v[i] = to + 4 * columns_;
    }
  }

  const AttentionDecodeParams& p_;
  const int64_t rows_, columns_;
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

// The head's rows of the output from `count` partial sums, `stride` floats apart, which it changes.
void finish(const Head& head, uint32_t lost, float* partial, int64_t count, int64_t stride) {
  const AttentionDecodeParams& p = head.p;
  const int64_t columns = p.cache.head_dim, group = head.rows() / p.rows, values = round_up(columns, kColumnStep);
  const auto sums = [&](int64_t s) { return Sums(partial + s * stride, head.rows(), columns); };
  for (int64_t row = 0; row < head.rows(); ++row) {
    const int64_t h = head.head * group + row / p.rows, i = row % p.rows;
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
    const float inverse = lost >> i & 1 ? NAN : total == 0 ? 0 : 1 / total;  // a row without keys is 0
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
// parts depend on a sequence's own length alone, so that its bits do.
struct Ranges {
  const AttentionDecodeParams& p;
  const int64_t heads;
  std::vector<Sequence> sequences;
  int64_t items = 0, keys = 0, most_splits = 1;

  explicit Ranges(const AttentionDecodeParams& p) : p(p), heads(p.cache.heads), sequences(p.cache.batch) {
    for (int64_t b = 0; b < p.cache.batch; ++b) {
      Sequence& s = sequences[b] = find_keys(p, b);
      s.splits = std::max<int64_t>((s.end - s.begin + kSplitKeys - 1) / kSplitKeys, 1);
      s.first_item = items, s.first_key = keys;
      items += s.splits * heads, keys += (s.end - s.begin) * heads;
      most_splits = std::max(most_splits, s.splits);
    }
  }

  Keys keys_of(int64_t item) const {
    const auto behind = std::upper_bound(sequences.begin(), sequences.end(), item,
                                         [](int64_t item, const Sequence& s) { return item < s.first_item; });
    const auto s = std::prev(behind);
    const int64_t part = item - s->first_item, key = s->begin + part / heads * kSplitKeys;
    return {{p, s - sequences.begin(), part % heads}, key, std::min(key + kSplitKeys, s->end)};
  }

  // The first item whose middle has so many keys or more before it.
  int64_t first_behind(int64_t count) const {
    const auto all = std::views::iota(int64_t{0}, items);
    const auto before = [&](int64_t item) {
      const auto [head, begin, end] = keys_of(item);
      const Sequence& s = sequences[head.batch];
      return s.first_key + (begin - s.begin) * heads + (end - begin) * head.head + (end - begin) / 2 < count;
    };
    return std::ranges::partition_point(all, before) - all.begin();
  }
};

}  // namespace
}  // namespace cpu

void attention_decode_cpu(const AttentionDecodeParams& p) {
  using namespace cpu;
  const Ranges ranges(p);
  const int64_t rows = Head{p, 0, 0}.rows(), columns = p.cache.head_dim, stride = Sums::floats(rows, columns);
  thread_local Scratch workspace;
  float* const partials = ranges.most_splits > 1 ? workspace.get(stride * ranges.items) : nullptr;
  const int64_t shares =
      std::clamp<int64_t>(ranges.keys * columns * rows / kLeastWork, 1, torch::stable::get_num_threads());
  torch::stable::parallel_for(0, shares, 1, [&](int64_t first, int64_t last) {
    Worker worker(p);
    const int64_t end = last == shares ? ranges.items : ranges.first_behind(ranges.keys * last / shares);
    for (int64_t item = ranges.first_behind(ranges.keys * first / shares); item < end;) {
      const Keys keys = ranges.keys_of(item);
      const Sequence& sequence = ranges.sequences[keys.head.batch];
      const int64_t count = std::min({worker.most_heads(), ranges.heads - keys.head.head, end - item});
      const bool whole = sequence.splits == 1;
      float* const sums = whole ? worker.own_sums() : partials + item * stride;
      item += count;
      worker.run(keys, count, sums, item < end ? ranges.keys_of(item) : keys);
      if (whole)
        for (int64_t h = 0; h < count; ++h)
          finish({p, keys.head.batch, keys.head.head + h}, sequence.lost, sums + h * stride, 1, 0);
    }
  });
  if (ranges.most_splits == 1) return;
  torch::stable::parallel_for(0, p.cache.batch * ranges.heads, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t head = i % ranges.heads;
      const Sequence& s = ranges.sequences[i / ranges.heads];
      if (s.splits > 1)
        finish({p, i / ranges.heads, head}, s.lost, partials + (s.first_item + head) * stride, s.splits,
               ranges.heads * stride);
    }
  });
}

}  // namespace forwardpass
