// A few rows against all keys of their sequence: what binds is reading the cache once.
//
// An item is one head of the cache and kSplitKeys keys of a sequence; all query heads that share the head are its rows.
// Tiles of kTileKeys keys become words (words.h) in a buffer that stays in L2, those of up to kTogether heads at once,
// as they lie side by side in memory: head by head, reads of 128 bytes a kilobyte apart waited for memory three
// quarters of the time. Rows are multiplied with a tile R at a time. Items leave their sums to a workspace, and a
// second pass adds those of a sequence in order: which keys an item has depends on the sequence alone, so that bits
// depend neither on the number of threads nor on the batch.
//
// Scores are computed for R rows and w = lanes / R keys a vector: a product's lane r * w + t is of row r and of every
// w-th word of a key from the t-th on, so that no lane is idle whatever R is. `fold` adds the w lanes of w keys at
// once.
#include <algorithm>
#include <bit>
#include <cfloat>

#include "cpu/activation.h"
#include "cpu/memory.h"
#include "cpu/words.h"
#include "params/attention_decode.h"
#include "torch/check.h"

namespace forwardpass {
namespace cpu {
namespace {

constexpr int64_t kSplitKeys = 512;
constexpr int kTileKeys = 32;
constexpr int64_t kTogether = 8;
constexpr int64_t kColumnStep = 2 * kMostLanes;  // what columns are padded to: two vectors

// Keys of one sequence, from the first that any of its rows sees.
struct Sequence {
  int64_t begin, end, splits, first_item;
};

// The sums of an item's rows, maxima in units of log2(e).
struct Sums {
  float* values;  // [rows][padded columns]
  float *maxima, *totals;

  static int64_t floats(int64_t rows, int64_t columns) { return rows * (round_up(columns, kColumnStep) + 2); }
  Sums(float* memory, int64_t rows, int64_t columns)
      : values(memory), maxima(memory + rows * round_up(columns, kColumnStep)), totals(maxima + rows) {}
};

template <class A>
INLINE constexpr int64_t words_of(int64_t columns) {
  return round_up(columns, kMostLanes * A::kElements) / A::kElements;
}

// One head of the cache, and the rows that read it: query head by query head, each with those of its sequence.
struct Head {
  const AttentionDecodeParams& p;
  int64_t batch, head;

  int64_t rows() const { return int64_t{p.heads / p.cache.heads} * p.rows; }

  // Calls f(row, i) with the address of the i-th of n keys from `key` on, of a tensor of the cache and this head.
  template <class Strides, class F>
  INLINE void for_each_key(const Strides& t, int64_t size, int64_t key, int n, F f) const {
    const KvCache& c = p.cache;
    for (int i = 0; i < n;) {
      int64_t first = batch, row = key + i;
      if (c.block_table) {
        first = c.block_table[batch * c.table_stride + row / c.page];
        row %= c.page;
      }
      auto data = reinterpret_cast<const char*>(t.data) + (first * t.first + row * t.row + head * t.head) * size;
      const int end = static_cast<int>(std::min<int64_t>(n, i + c.page - row));
      for (; i < end; ++i, data += t.row * size) f(data, i);
    }
  }

  void copy_scales(const CacheScale& s, int64_t key, int n, float* to) const {
    if (!s.per_token) {
      std::fill_n(to, n, s.data ? s.data[head * s.head] : 1);
    } else {
      for_each_key(s, 4, key, n, [&](const char* scale, int i) { std::memcpy(to + i, scale, 4); });
    }
  }
};

// n keys from `key` on, as words.
struct Tile {
  int64_t key;
  int n;
  float *k, *v;              // [kTileKeys][words]; panels of two vectors of columns: [words of kTileKeys][2 lanes]
  float *k_scale, *v_scale;  // [kTileKeys]
  float* scores;             // [kTileKeys][R], then probabilities
};

// Columns of a row as words, zeros up to the last vector's end.
template <class A, Dtype D, class V = typename A::V>
INLINE void copy_words(const char* row, int64_t columns, float* words) {
  for_each_vector<V>(
      0, columns, VECTOR_BODY(&) {
        const V values = load<V, D>(row, c, n);
        if constexpr (A::kElements == 1) {
          store<Dtype::f32>(values, words, c);
        } else {  // exact: 8 bits and bfloat16 are no more than bfloat16
          const Uints<V> high = bits<Uints<V>>(values) >> 16;
          store_bits(__builtin_convertvector(high, Halves<V>), reinterpret_cast<uint16_t*>(words) + c, kLanes<V>);
        }
      });
}

// The tiles of `count` heads, the first one's given.
template <class A, Dtype D, class V = typename A::V>
INLINE void copy_tiles(const Head& head, const Tile* tiles, int64_t count) {
  constexpr int64_t kPanel = 2 * kLanes<V>, kDepth = kTileKeys / A::kElements;
  const KvCache& c = head.p.cache;
  const Tile& tile = tiles[0];
  const int64_t columns = c.head_dim, words = words_of<A>(columns);
  head.for_each_key(c.k, size_of(D), tile.key, tile.n, [&](const char* row, int i) __attribute__((always_inline)) {
    for (int64_t h = 0; h < count; ++h)
      copy_words<A, D>(row + h * c.k.head * size_of(D), columns, tiles[h].k + i * words);
  });
  const char* rows[kTileKeys];
  head.for_each_key(c.v, size_of(D), tile.key, tile.n, [&](const char* row, int i) { rows[i] = row; });
  for (int i = 0; i < tile.n; i += A::kElements)
    for (int64_t h = 0; h < count; ++h) {
      const int64_t offset = h * c.v.head * size_of(D);
      for_each_vector<V>(
          0, columns, VECTOR_BODY(&) {
            V word = load<V, D>(rows[i] + offset, c, n);
            if constexpr (A::kElements == 2) {
              Uints<V> high{};  // what is missing is 0, as its probability is
              if (i + 1 < tile.n) high = bits<Uints<V>>(load<V, D>(rows[i + 1] + offset, c, n)) & 0xffff0000;
              word = bits<V>(bits<Uints<V>>(word) >> 16 | high);
            }
            const int64_t row = c / kPanel * kDepth + i / A::kElements;
            store<Dtype::f32>(word, tiles[h].v + row * kPanel, c % kPanel);
          });
    }
}

// Lane i of the result is lane f(i) of a and, behind it, b.
template <auto F, class V>
INLINE V permute(V a, V b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, F(I)...);
  }(std::make_integer_sequence<int, kLanes<V>>{});
}
template <auto F, class V>
INLINE V permute(V a) {
  return permute<F>(a, a);
}

// Lanes without bit S: a's, to which those with it are added; the others: b's.
template <int S, class V>
INLINE V fold_pair(V a, V b) {
  constexpr int kN = kLanes<V>;
  const V low = permute<[](int i) { return i & S ? i + kN : i; }>(a, b),
          high = permute<[](int i) { return i & S ? i : i + kN; }>(a, b);
  return low + permute<[](int i) { return i ^ S; }>(high);
}
// x[0]: in lane r * W + t the sum of x[t]'s lanes r * W to r * W + W - 1.
template <int W, int S = 1, class V>
INLINE void fold(V* x) {
  if constexpr (S < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; i += 2 * S) x[i] = fold_pair<S>(x[i], x[i + S]);
    fold<W, 2 * S>(x);
  }
}

// lanes / R words from memory, over and over.
template <int R, class V>
INLINE V repeat(const float* from) {
  constexpr int kWords = kLanes<V> / R;
  if constexpr (R == 1)
    return load<V, Dtype::f32>(from, 0);
  else if constexpr (kWords <= 2) {
    using Word = std::conditional_t<kWords == 1, uint32_t, uint64_t>;
    typedef Word Words __attribute__((vector_size(sizeof(V))));
    Word word;
    std::memcpy(&word, from, sizeof(word));
    return bits<V>(Words{} + word);
  } else {
    using Part = typename Vectors<kWords>::f32;
    Part part;
    std::memcpy(&part, from, sizeof(part));
    return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
      return __builtin_shufflevector(part, part, (I % kWords)...);
    }(std::make_integer_sequence<int, kLanes<V>>{});
  }
}

template <class V>
INLINE V tanh(V x) {
  const V e = exp2_negative(abs(x) * (-2 * kLog2e));
  return bits<V>(bits<Uints<V>>((1 - e) / (1 + e)) | (bits<Uints<V>>(x) & 0x80000000));
}

// Words of probabilities: of one key, or of an even one and the next.
template <class A, int R, class V = typename A::V>
INLINE V probability_words(V (&e)[A::kElements]) {
  if constexpr (A::kElements == 1) {
    return e[0];
  } else {
    const V even = permute<[](int i) { return i / R * 2 * R + i % R; }>(e[0], e[1]),
            odd = permute<[](int i) { return i / R * 2 * R + R + i % R; }>(e[0], e[1]);
    return bits<V>(__builtin_convertvector(A::to_bfloat(even), Uints<V>) |
                   __builtin_convertvector(A::to_bfloat(odd), Uints<V>) << 16);
  }
}

// sums [R, columns of a panel] = sums * correction + p [R, depth] panel [depth, columns]
template <class A, int R, class V = typename A::V>
INLINE void add_values(const float* p, int64_t p_stride, const float* panel, int depth, const float* corrections,
                       float* sums, int64_t sums_stride) {
  V x[R][2];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) x[r][0] = x[r][1] = V{};
  for (int d = 0; d < depth; ++d, panel += 2 * kLanes<V>, p += p_stride) {
    const V low = load<V, Dtype::f32>(panel, 0), high = load<V, Dtype::f32>(panel, kLanes<V>);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const V factor = repeat<kLanes<V>, V>(p + r);
      x[r][0] = A::multiply_add(factor, low, x[r][0]);
      x[r][1] = A::multiply_add(factor, high, x[r][1]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < 2; ++v) {
      float* to = sums + r * sums_stride + v * kLanes<V>;
      store<Dtype::f32>(load<V, Dtype::f32>(to, 0) * corrections[r] + x[r][v], to, 0);
    }
}

// R rows, from `first` on, against a tile; q: their words, as `arrange_rows` has them.
template <class A, int R, class V = typename A::V>
INLINE void attend(const Head& head, const Tile& tile, int64_t length, const float* q, int64_t first,
                   const Sums& sums) {
  constexpr int kN = kLanes<V>, kWords = kN / R;
  constexpr auto kKeyOf = [](int i) { return i / R; };
  const AttentionDecodeParams& p = head.p;
  const int64_t words = words_of<A>(p.cache.head_dim);
  const int64_t place = length - p.rows;  // of each head's first row
  const bool masked = tile.key + tile.n - 1 > place || tile.key + p.left < length - 1 || tile.n % kN;
  // A lane's keys by their middle and half their number, which is below 0 where there are none: g++ 12 makes scalars of
  // two comparisons with the first and the last one.
  alignas(64) float middle[kN], half[kN], slot[kN];
  for (int i = 0; masked && i < kN; ++i) {
    const int64_t row = place + (first + i % R) % p.rows - tile.key;
    const auto low = static_cast<float>(std::clamp<int64_t>(row - p.left, 0, kTileKeys)),
               high = static_cast<float>(std::clamp<int64_t>(row, -1, tile.n - 1));
    middle[i] = (high + low) / 2, half[i] = (high - low) / 2, slot[i] = static_cast<float>(i / R);
  }
  const float factor = p.softcap > 0 ? p.scale / p.softcap : p.scale * kLog2e;
  V largest = splat<V>(-INFINITY);
  for (int key = 0; key < tile.n; key += kN) {
    V x[kN];
#pragma GCC unroll 16
    for (int i = 0; i < kN; ++i) x[i] = V{};
    const float* k = tile.k + key * words;
    for (int64_t w = 0; w < words; w += kWords) {
      const V row = load<V, Dtype::f32>(q, w * R);
#pragma GCC unroll 16
      for (int i = 0; i < kN; ++i) x[i] = A::multiply_add(row, repeat<R, V>(k + i * words + w), x[i]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < R; ++i) {
      fold<kWords>(x + i * kWords);
      const int first_key = key + i * kWords;
      V s = permute<[](int i) { return i % R * kWords + i / R; }>(x[i * kWords]);
      s *= permute<kKeyOf>(load<V, Dtype::f32>(tile.k_scale, first_key)) * factor;
      if (p.softcap > 0) s = tanh(s) * (p.softcap * kLog2e);
      if (masked) {
        const V j = load<V, Dtype::f32>(slot, 0) + static_cast<float>(first_key);
        const V distance = abs(j - load<V, Dtype::f32>(middle, 0));
        s = select_less(load<V, Dtype::f32>(half, 0), distance, splat<V>(-INFINITY), s);
      }
      store<Dtype::f32>(s, tile.scores, first_key * R);
      largest = max(s, largest);
    }
  }
  if constexpr (R <= 1) largest = max(largest, permute<[](int i) { return i ^ 1; }>(largest));
  if constexpr (R <= 2) largest = max(largest, permute<[](int i) { return i ^ 2; }>(largest));
  if constexpr (R <= 4 && kN > 4) largest = max(largest, permute<[](int i) { return i ^ 4; }>(largest));
  if constexpr (R <= 8 && kN > 8) largest = max(largest, permute<[](int i) { return i ^ 8; }>(largest));
  const V before = repeat<kWords, V>(sums.maxima + first), maxima = max(largest, before);
  // While no key counts yet the maximum is -inf, and the difference to it would be NaN.
  const V subtrahend = select_less(maxima, splat<V>(-FLT_MAX), V{}, maxima);
  alignas(64) float corrections[kN], totals[kN];
  store<Dtype::f32>(exp2_negative(before - subtrahend), corrections, 0);
  V total{};
  const int vectors = (tile.n + kN - 1) / kN * R;
  if (vectors % A::kElements) store<Dtype::f32>(splat<V>(-INFINITY), tile.scores, vectors * kN);
  for (int i = 0; i < vectors; i += A::kElements) {
    V e[A::kElements];
#pragma GCC unroll 2
    for (int j = 0; j < A::kElements; ++j) {
      e[j] = exp2_negative(load<V, Dtype::f32>(tile.scores, (i + j) * kN) - subtrahend);
      total += e[j];
      e[j] *= permute<kKeyOf>(load<V, Dtype::f32>(tile.v_scale, (i + j) * kWords));
    }
    store<Dtype::f32>(probability_words<A, R>(e), tile.scores, i / A::kElements * kN);
  }
  store<Dtype::f32>(total, totals, 0);
  for (int r = 0; r < R; ++r) {
    float t = 0;
    for (int i = r; i < kN; i += R) t += totals[i];
    sums.totals[first + r] = sums.totals[first + r] * corrections[r] + t;
    sums.maxima[first + r] = maxima[r];
  }
  constexpr int kRows = std::min(R, kN == 16 ? 8 : 4);
  const int64_t stride = round_up(p.cache.head_dim, kColumnStep);
  const int depth = (tile.n + A::kElements - 1) / A::kElements;
  for (int64_t c = 0; c < p.cache.head_dim; c += 2 * kN)
    for (int r = 0; r < R; r += kRows)
      add_values<A, kRows>(tile.scores + r, R, tile.v + c * (kTileKeys / A::kElements), depth, corrections + r,
                           sums.values + (first + r) * stride + c, stride);
}

// The rows' words, R rows at a time: of each w = lanes / R words, row by row. Rows beyond the last are 0.
template <class A, int R, class V = typename A::V>
INLINE void arrange_rows(const Head& head, float* memory, float* to) {
  constexpr int kWords = kLanes<V> / R;
  const AttentionDecodeParams& p = head.p;
  const int64_t columns = p.cache.head_dim, words = words_of<A>(columns), rows = head.rows();
  for (int64_t row = 0; row < round_up(rows, R); ++row) {
    std::fill_n(memory, words, 0.0f);
    if (row < rows) {
      const int64_t h = head.head * (rows / p.rows) + row / p.rows, i = row % p.rows;
      auto q =
          static_cast<const char*>(p.q.data) + (head.batch * p.q.batch + i * p.q.row + h * p.q.head) * size_of(p.dtype);
      with_float_dtype(p.dtype, [&](auto dtype) __attribute__((always_inline)) {
        copy_words<A, decltype(dtype)::value>(q, columns, memory);
      });
    }
    for (int64_t w = 0; w < words; w += kWords)
      std::memcpy(to + row / R * R * words + (w * R + row % R * kWords), memory + w, 4 * kWords);
  }
}

// Whether words are pairs: q is then bfloat16, of which float32 has no more to tell.
bool uses_pairs(const AttentionDecodeParams& p) {
  return p.dtype == Dtype::bf16 && p.cache.dtype != Dtype::f16 && p.cache.dtype != Dtype::f32 && has_avx512_bf16();
}

template <class F>
INLINE void with_arithmetic(bool pairs, F f) {
  with_vectors(VECTOR_CODE {
#if defined(__x86_64__)
    if constexpr (kLanes<V> == 16)
      if (pairs) return f(BfloatPairs{});
#endif
    f(Floats<V, Dtype::f32>{});
  });
}

// Calls f with the number of rows that are multiplied at a time, a power of two of at most the lanes.
template <class V, class F>
INLINE void with_rows(int64_t rows, F f) {
  if (rows <= 1) return f(std::integral_constant<int, 1>{});
  if (rows <= 2) return f(std::integral_constant<int, 2>{});
  if constexpr (kLanes<V> >= 8)
    if (rows <= 4) return f(std::integral_constant<int, 4>{});
  if constexpr (kLanes<V> >= 16)
    if (rows <= 8) return f(std::integral_constant<int, 8>{});
  f(std::integral_constant<int, kLanes<V>>{});
}

template <class A, class F>
INLINE void with_cache_dtype(Dtype dtype, F f) {
  if (dtype == Dtype::i8) return f(std::integral_constant<Dtype, Dtype::i8>{});
  if (dtype == Dtype::e4m3) return f(std::integral_constant<Dtype, Dtype::e4m3>{});
  if constexpr (A::kElements == 2) {
    f(std::integral_constant<Dtype, Dtype::bf16>{});
  } else {
    with_float_dtype(dtype, f);
  }
}

// What a thread works in.
class Worker {
 public:
  Worker(const AttentionDecodeParams& p, int64_t rows)
      : p_(p), pairs_(uses_pairs(p)), padded_rows_(rows), together_(std::min<int64_t>(p.cache.heads, kTogether)) {
    const int64_t columns = round_up(p.cache.head_dim, kColumnStep);
    const int64_t sizes[] = {kTileKeys * columns,
                             kTileKeys * columns,
                             kTileKeys + kMostLanes,
                             kTileKeys + kMostLanes,
                             kTileKeys * std::max<int64_t>(rows, kMostLanes),
                             rows * columns,
                             round_up(Sums::floats(rows, p.cache.head_dim), kMostLanes)};
    int64_t total = columns;
    for (int64_t n : sizes) total += together_ * n;
    memory_ = allocate(4 * total);
    row_ = reinterpret_cast<float*>(memory_[0].bytes);
    std::fill_n(row_, total, 0.0f);  // words beyond a row's columns are multiplied
    float* next = row_ + columns;
    for (int64_t h = 0; h < together_; ++h) {
      float** parts[] = {&tiles_[h].k,      &tiles_[h].v, &tiles_[h].k_scale, &tiles_[h].v_scale,
                         &tiles_[h].scores, &q_[h],       &sums_[h]};
      for (int i = 0; i < 7; ++i) *parts[i] = next, next += sizes[i];
    }
  }

  // Heads that a call of `run` may have.
  int64_t together() const { return together_; }

  // Fills in the sums of `count` heads' rows, of keys from `begin` to `end` of a sequence that is `length` long.
  void run(const Head& first, int64_t count, int64_t begin, int64_t end, int64_t length, const Sums* sums) {
    const int64_t columns = round_up(p_.cache.head_dim, kColumnStep);
    for (int64_t h = 0; h < count; ++h) {
      std::fill_n(sums[h].values, padded_rows_ * columns, 0.0f);
      std::fill_n(sums[h].maxima, padded_rows_, -INFINITY);
      std::fill_n(sums[h].totals, padded_rows_, 0.0f);
      arrange({p_, first.batch, first.head + h}, q_[h]);
    }
    for (int64_t key = begin; key < end; key += kTileKeys) {
      for (int64_t h = 0; h < count; ++h) {
        tiles_[h].key = key, tiles_[h].n = static_cast<int>(std::min<int64_t>(kTileKeys, end - key));
        const Head head{p_, first.batch, first.head + h};
        head.copy_scales(p_.cache.k_scale, key, tiles_[h].n, tiles_[h].k_scale);
        head.copy_scales(p_.cache.v_scale, key, tiles_[h].n, tiles_[h].v_scale);
      }
      copy(first, count);
      for (int64_t h = 0; h < count; ++h)
        attend_all({p_, first.batch, first.head + h}, tiles_[h], length, q_[h], sums[h]);
    }
  }

  Sums own_sums(int64_t h) const { return Sums(sums_[h], padded_rows_, p_.cache.head_dim); }

 private:
  // Functions apart, so that kernels of every dtype are not compiled with those for every number of rows.
  __attribute__((noinline)) void arrange(const Head& head, float* q) const {
    with_arithmetic(pairs_, [&]<class A>(A) __attribute__((always_inline)) {
      with_rows<typename A::V>(
          head.rows(), [&](auto rows) __attribute__((always_inline)) { arrange_rows<A, rows()>(head, row_, q); });
    });
  }
  __attribute__((noinline)) void copy(const Head& first, int64_t count) const {
    with_arithmetic(pairs_, [&]<class A>(A) __attribute__((always_inline)) {
      with_cache_dtype<A>(p_.cache.dtype, [&](auto dtype) __attribute__((always_inline)) {
        copy_tiles<A, decltype(dtype)::value>(first, tiles_, count);
      });
    });
  }
  __attribute__((noinline)) void attend_all(const Head& head, const Tile& tile, int64_t length, const float* q,
                                            const Sums& sums) const {
    with_arithmetic(pairs_, [&]<class A>(A) __attribute__((always_inline)) {
      with_rows<typename A::V>(head.rows(), [&](auto rows) __attribute__((always_inline)) {
        constexpr int kRows = rows();
        for (int64_t first = 0; first < head.rows(); first += kRows)
          attend<A, kRows>(head, tile, length, q + first * words_of<A>(p_.cache.head_dim), first, sums);
      });
    });
  }

  const AttentionDecodeParams& p_;
  const bool pairs_;
  const int64_t padded_rows_, together_;
  CacheLines memory_;
  float* row_;
  Tile tiles_[kTogether];
  float *q_[kTogether], *sums_[kTogether];
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

// The head's rows of the output from `count` partial sums, `stride` floats apart.
void finish(const Head& head, float* partial, int64_t padded_rows, int64_t count, int64_t stride) {
  const AttentionDecodeParams& p = head.p;
  const int64_t columns = p.cache.head_dim, group = head.rows() / p.rows, values = round_up(columns, kColumnStep);
  std::vector<float> factors(count);
  for (int64_t row = 0; row < head.rows(); ++row) {
    const int64_t h = head.head * group + row / p.rows, i = row % p.rows;
    const auto sums = [&](int64_t s) { return Sums(partial + s * stride, padded_rows, columns); };
    const float sink = sink_of(p, h);
    float maximum = sink;
    for (int64_t s = 0; s < count; ++s) maximum = std::max(maximum, sums(s).maxima[row]);
    const float subtrahend = maximum == -INFINITY ? 0 : maximum;
    float total = std::exp2(sink - subtrahend);
    for (int64_t s = 0; s < count; ++s) {
      factors[s] = std::exp2(sums(s).maxima[row] - subtrahend);
      total += factors[s] * sums(s).totals[row];
    }
    const float inverse = total == 0 ? 0 : 1 / total;  // a row without keys is 0
    char* out = static_cast<char*>(p.out) + ((head.batch * p.rows + i) * p.heads + h) * columns * size_of(p.dtype);
    with_vectors(VECTOR_CODE {
      with_float_dtype(p.dtype, [&](auto dtype) __attribute__((always_inline)) {
        for_each_vector<V>(
            0, columns, VECTOR_BODY(&) {
              V x{};
              for (int64_t s = 0; s < count; ++s)
                x += load<V, Dtype::f32>(partial + s * stride + row * values, c) * factors[s];
              store<decltype(dtype)::value>(x * inverse, out, c, n);
            });
      });
    });
  }
}

}  // namespace
}  // namespace cpu

void attention_decode_cpu(const AttentionDecodeParams& p) {
  using namespace cpu;
  std::vector<Sequence> sequences(p.cache.batch);
  const int64_t heads = p.cache.heads, rows = Head{p, 0, 0}.rows(), columns = p.cache.head_dim;
  const int64_t padded_rows =
      rows < kMostLanes ? std::bit_ceil(static_cast<uint64_t>(rows)) : round_up(rows, kMostLanes);
  int64_t items = 0, keys = 0, most_splits = 1;
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    const int64_t length = p.cache.seq_lens[b], begin = std::min<int64_t>(p.first_key(b), length);
    const int64_t splits = std::max<int64_t>((length - begin + kSplitKeys - 1) / kSplitKeys, 1);
    sequences[b] = {begin, length, splits, items};
    items += splits * heads, keys += length - begin;
    most_splits = std::max(most_splits, splits);
  }
  const int64_t stride = round_up(Sums::floats(padded_rows, columns), kMostLanes);
  const CacheLines workspace = allocate(most_splits > 1 ? 4 * stride * items : 0);
  auto partial = [&](int64_t item) { return reinterpret_cast<float*>(workspace.get()) + item * stride; };
  const int64_t work = keys * heads * columns * rows / items;
  torch::stable::parallel_for(0, items, (1 << 16) / (work + 1) + 1, [&](int64_t first, int64_t last) {
    Worker worker(p, padded_rows);
    int64_t b = 0;
    for (int64_t item = first, count; item < last; item += count) {
      while (b + 1 < p.cache.batch && sequences[b + 1].first_item <= item) ++b;
      const auto [begin, end, splits, first_item] = sequences[b];
      const int64_t head = (item - first_item) % heads, key = begin + (item - first_item) / heads * kSplitKeys;
      count = std::min({last - item, heads - head, worker.together()});
      std::vector<Sums> sums;
      for (int64_t h = 0; h < count; ++h)
        sums.push_back(splits == 1 ? worker.own_sums(h) : Sums(partial(item + h), padded_rows, columns));
      worker.run({p, b, head}, count, key, std::min(key + kSplitKeys, end), end, sums.data());
      for (int64_t h = 0; splits == 1 && h < count; ++h) finish({p, b, head + h}, sums[h].values, padded_rows, 1, 0);
    }
  });
  if (most_splits == 1) return;
  torch::stable::parallel_for(0, p.cache.batch * heads, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Sequence& s = sequences[i / heads];
      if (s.splits > 1)
        finish({p, i / heads, i % heads}, partial(s.first_item + i % heads), padded_rows, s.splits, heads * stride);
    }
  });
}

}  // namespace forwardpass
