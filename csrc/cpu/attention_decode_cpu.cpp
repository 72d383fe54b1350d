// A few rows against all keys of their sequence: what binds is reading the cache once.
//
// An item is one head of the cache and kSplitKeys keys of a sequence; all query heads that share the head are its rows,
// kMostRows at a time. Items leave their sums to a workspace, and a second pass adds those of a sequence in order:
// which keys an item has depends on the sequence alone, so that bits depend neither on the number of threads nor on the
// batch.
//
// Keys and values are read where they lie, as words (words.h), in tiles of kTileKeys. A score's lanes are added last:
// `fold` adds those of as many keys as there are lanes at once. While a tile is multiplied, the next one is prefetched:
// rows of one head may be a kilobyte apart, where no hardware does it.
//
// Of the bandwidth of a copy, read and written, one core of an EPYC (Zen 4), caches that are in no cache of the CPU,
// one row of 3 or 4 heads on each of the cache's, 64 and 128 columns, 1024 and 4096 keys: float32 67 to 77 %, bfloat16
// 63 to 71 %, float16 58 to 65 %, int8 49 to 55 % (29 to 33 with a float32 q, whose products are in float32). What was
// there before copied tiles as words, of all heads at once, and multiplied those: 20 to 28 %, 9 to 13 %, 13 to 16 %, 6
// %.
#include <algorithm>
#include <cfloat>
#include <numeric>

#include "cpu/activation.h"
#include "cpu/memory.h"
#include "cpu/words.h"
#include "params/attention_decode.h"
#include "torch/check.h"

namespace forwardpass {
namespace cpu {
namespace {

constexpr int64_t kSplitKeys = 512;
constexpr int kTileKeys = 64;
constexpr int kMostRows = 4;
constexpr int64_t kColumnStep = 2 * kMostLanes;  // what columns are padded to: a vector of pairs

// Keys of one sequence, from the first that any of its rows sees.
struct Sequence {
  int64_t begin, end, splits, first_item;
};

// The sums of an item's rows, maxima in units of log2(e).
struct Sums {
  float* values;  // [rows][padded columns]
  float *maxima, *totals;

  static int64_t floats(int64_t rows, int64_t columns) {
    return round_up(rows * (round_up(columns, kColumnStep) + 2), kMostLanes);
  }
  Sums(float* memory, int64_t rows, int64_t columns)
      : values(memory), maxima(memory + rows * round_up(columns, kColumnStep)), totals(maxima + rows) {}
};

// One head of the cache, and the rows that read it: query head by query head, each with those of its sequence.
struct Head {
  const AttentionDecodeParams& p;
  int64_t batch, head;

  int64_t rows() const { return int64_t{p.heads / p.cache.heads} * p.rows; }

  // Calls f(data, i, end) with the address of keys i to end - 1 of n from `key` on, of a tensor of the cache and this
  // head; they are t.row apart.
  template <class Strides, class F>
  INLINE void for_each_run(const Strides& t, int64_t size, int64_t key, int n, F f) const {
    const KvCache& c = p.cache;
    for (int i = 0; i < n;) {
      int64_t first = batch, row = key + i;
      if (c.block_table) {
        first = c.block_table[batch * c.table_stride + row / c.page];
        row %= c.page;
      }
      const int end = static_cast<int>(std::min<int64_t>(n, i + c.page - row));
      f(reinterpret_cast<const char*>(t.data) + (first * t.first + row * t.row + head * t.head) * size, i, end);
      i = end;
    }
  }
};

// Keys from `begin` to `end` of a head.
struct Keys {
  Head head;
  int64_t begin, end;
};

// n keys from `key` on. What is behind the last, up to kTileKeys, is the last one.
struct Tile {
  int64_t key;
  int n;
  const char *k[kTileKeys], *v[kTileKeys];

  void find(const Keys& keys, int64_t first) {
    const KvCache& c = keys.head.p.cache;
    key = first, n = static_cast<int>(std::min<int64_t>(kTileKeys, keys.end - first));
    find_rows(keys.head, c.k, size_of(c.dtype), k), find_rows(keys.head, c.v, size_of(c.dtype), v);
  }

 private:
  INLINE void find_rows(const Head& head, const CacheTensor& t, int64_t size, const char** rows) const {
    head.for_each_run(t, size, key, n, [&](const char* row, int i, int end) {
      for (; i < end; ++i, row += t.row * size) rows[i] = row;
    });
    std::fill(rows + n, rows + kTileKeys, rows[n - 1]);
  }
};

// f(0), f(1), ... f(N - 1), as constants: what arrays have is then in registers.
template <int N, class F>
INLINE void unrolled(F f) {
  [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    (f(std::integral_constant<int, I>{}), ...);
  }(std::make_integer_sequence<int, N>{});
}
#define UNROLLED_BODY(i) [&](auto i) __attribute__((always_inline))

// Lane i of the result is lane f(i) of a and, behind it, b.
template <auto F, class V>
INLINE V permute(V a, V b) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(a, b, F(I)...);
  }(std::make_integer_sequence<int, kLanes<V>>{});
}
// Lane i of every second unit of a and, behind it, b, within groups of as many lanes.
constexpr int every_second(int i, int lanes, int group, int unit) {
  const int half = group / 2, in_half = i % half;
  return i / group * group + in_half / unit * 2 * unit + in_half % unit + (i % group < half ? 0 : lanes);
}
// Sums of two neighbours, or of every fourth lanes, a's and b's. The shuffles are one instruction each.
template <int Level, class S, class V>
INLINE S fold_pair(S x, S y) {
  constexpr int kUnit = Level < 2 ? 1 : 4, kGroup = Level < 2 ? 4 : kLanes<V>;
  const V a = bits<V>(x), b = bits<V>(y);
  return bits<S>(permute<[](int i) { return every_second(i, kLanes<V>, kGroup, kUnit); }>(a, b)) +
         bits<S>(permute<[](int i) { return every_second(i, kLanes<V>, kGroup, kUnit) + kUnit; }>(a, b));
}
// x[0]: in lane i the sum of x[i]'s lanes, at Level 0; levels may be taken one after the other.
template <class V, int N, int Level, class S>
INLINE void fold(S* x) {
  if constexpr (N > 1) {
    unrolled<N / 2>(UNROLLED_BODY(i) { x[i] = fold_pair<Level, S, V>(x[2 * i], x[2 * i + 1]); });
    fold<V, N / 2, Level + 1>(x);
  }
}

template <class V>
INLINE V floats(Ints<V> sums) {
  return __builtin_convertvector(sums, V);
}
template <class V>
INLINE V floats(V sums) {
  return sums;
}

template <class V>
INLINE V tanh(V x) {
  const V e = exp2_negative(abs(x) * (-2 * kLog2e));
  return bits<V>(bits<Uints<V>>((1 - e) / (1 + e)) | (bits<Uints<V>>(x) & 0x80000000));
}

// n floats, n a multiple of the lanes, to elements of words; what these have to be multiplied by. Integers are at most
// `most`; of an infinity or a NaN it is NaN.
template <class A, class V = typename A::V>
INLINE float pack(const float* from, int64_t n, float most, float* to) {
  if constexpr (A::kDtype == Dtype::i8 && A::kElements == 2) {
    V largest{}, zeros{};
    for (int64_t i = 0; i < n; i += kLanes<V>) {
      const V x = load<V, Dtype::f32>(from, i);
      largest = max(abs(x), largest), zeros += x * 0;
    }
    const float range = cpu::largest(largest), inverse = range > 0 ? most / range : 0;
    for (int64_t i = 0; i < n; i += kLanes<V>)
      store_bits(__builtin_convertvector(to_int(load<V, Dtype::f32>(from, i) * inverse, -most, most), Halves<V>),
                 reinterpret_cast<uint16_t*>(to) + i, kLanes<V>);
    return range / most + sum(zeros);
  } else {
    for (int64_t i = 0; i < n; i += kLanes<V>) A::store_probabilities(load<V, Dtype::f32>(from, i), to, i);
    return 1;
  }
}

// R rows of a head, which see the keys from low to high of a tile.
struct Rows {
  const float* q;        // [R][words]
  const float* factors;  // [R], of scores
  int64_t words;
  int low[kMostRows], high[kMostRows];
  Sums sums;  // the first row's
};

// What a tile's scores are multiplied by, probabilities, and their words; [kMostRows][kTileKeys] those by row.
struct Buffers {
  float *k_scale, *v_scale, *scores, *words;
};

// Where column i of n is that low_pairs and, behind them, high_pairs have, four columns in turn.
constexpr int in_order(int i, int n) { return i / 8 * 4 + i % 4 + (i / 4 % 2) * n; }

template <class V>
INLINE void put_in_order(V& low, V& high) {
  const V first = permute<[](int i) { return in_order(i, kLanes<V>); }>(low, high);
  high = permute<[](int i) { return in_order(i, kLanes<V>) + kLanes<V> / 2; }>(low, high);
  low = first;
}

// To L2: to L1 they were taken no faster than without a prefetch, as a core has few such requests at a time.
INLINE void prefetch(const char* p) { __builtin_prefetch(p, 0, 2); }

// sums [R, columns of C vectors of words from `vector` on] = sums * correction + unit * p v
template <class A, int R, int C>
INLINE void add_values(const Tile& tile, const Tile& next, const float* p, int64_t vector, const float* corrections,
                       const float* units, float* sums, int64_t stride) {
  using V = typename A::V;
  using Sum = typename A::Sum;
  constexpr int kE = A::kElements, kN = kLanes<V>;
  constexpr int kBytes = C * kN * kE * static_cast<int>(size_of(A::kDtype));
  Sum x[R * C * kE];
  unrolled<R * C * kE>(UNROLLED_BODY(i) { x[i] = Sum{}; });
  for (int j = 0; j < tile.n; j += kE) {
    V v[C * kE];
    unrolled<C>(UNROLLED_BODY(c) {
      v[c * kE] = A::load_words(tile.v[j], vector + c);
      if constexpr (kE == 2) {
        const V even = v[c * kE], odd = A::load_words(tile.v[j + 1], vector + c);
        v[c * kE] = A::low_pairs(even, odd), v[c * kE + 1] = A::high_pairs(even, odd);
      }
    });
    unrolled<R>(UNROLLED_BODY(r) {
      const V weight = A::broadcast(p + r * kTileKeys + j / kE);
      unrolled<C * kE>(UNROLLED_BODY(c) { x[r * C * kE + c] = A::multiply_add(weight, v[c], x[r * C * kE + c]); });
    });
    for (int b = 0; b < kBytes; b += 64)
      unrolled<kE>(UNROLLED_BODY(e) { prefetch(next.v[j + e] + vector * (kBytes / C) + b); });
  }
  unrolled<R>(UNROLLED_BODY(r) {
    unrolled<C>(UNROLLED_BODY(c) {
      V y[kE];
      unrolled<kE>(UNROLLED_BODY(e) { y[e] = floats<V>(x[(r * C + c) * kE + e]) * units[r]; });
      if constexpr (kE == 2) put_in_order(y[0], y[1]);
      unrolled<kE>(UNROLLED_BODY(e) {
        float* to = sums + r * stride + (vector + c) * kN * kE + e * kN;
        store<Dtype::f32>(load<V, Dtype::f32>(to, 0) * corrections[r] + y[e], to, 0);
      });
    });
  });
}

// R rows against a tile, while the next one is prefetched.
template <class A, int R>
INLINE void attend(const AttentionDecodeParams& p, const Tile& tile, const Tile& next, const Rows& rows,
                   const Buffers& buffers) {
  using V = typename A::V;
  using Sum = typename A::Sum;
  constexpr int kN = kLanes<V>, kKeys = kN == 16 ? 4 : 2;  // whose sums are in registers together
  const int64_t words = rows.words, row_bytes = p.cache.head_dim * size_of(A::kDtype);
  const int keys = static_cast<int>(round_up(tile.n, kN));
  V largest[R];
  for (int r = 0; r < R; ++r) largest[r] = splat<V>(-INFINITY);
  for (int key = 0; key < keys; key += kN) {
    Sum x[R][kN / kKeys];
    for (int i = 0; i < kN; i += kKeys) {
      Sum s[R][kKeys];
      unrolled<R * kKeys>(UNROLLED_BODY(j) { s[j / kKeys][j % kKeys] = Sum{}; });
      const char* const* k = tile.k + key + i;
      for (int64_t w = 0; w < words / kN; ++w) {
        V row[kKeys];
        unrolled<kKeys>(UNROLLED_BODY(j) { row[j] = A::load_words(k[j], w); });
        unrolled<R>(UNROLLED_BODY(r) {
          const V q = load<V, Dtype::f32>(rows.q + r * words, w * kN);
          unrolled<kKeys>(UNROLLED_BODY(j) { s[r][j] = A::multiply_add(q, row[j], s[r][j]); });
        });
      }
      unrolled<R>(UNROLLED_BODY(r) {
        fold<V, kKeys, 0>(s[r]);
        x[r][i / kKeys] = s[r][0];
      });
      for (int64_t b = 0; b < row_bytes; b += 64)
        unrolled<kKeys>(UNROLLED_BODY(j) { prefetch(next.k[key + i + j] + b); });
    }
    const V k_scale = load<V, Dtype::f32>(buffers.k_scale, key);
    const auto j = lane_numbers<V>() + key;
    unrolled<R>(UNROLLED_BODY(r) {
      fold<V, kN / kKeys, kKeys == 4 ? 2 : 1>(x[r]);
      V s = floats<V>(x[r][0]) * (k_scale * rows.factors[r]);
      if (p.softcap > 0) s = tanh(s) * (p.softcap * kLog2e);
      if (rows.low[r] > key || rows.high[r] < key + kN - 1) {
        s = select_less(j, splat<Ints<V>>(rows.low[r]), splat<V>(-INFINITY), s);
        s = select_less(splat<Ints<V>>(rows.high[r]), j, splat<V>(-INFINITY), s);
      }
      store<Dtype::f32>(s, buffers.scores + r * kTileKeys, key);
      largest[r] = max(s, largest[r]);
    });
  }
  float corrections[R], units[R];
  for (int r = 0; r < R; ++r) {
    float &maximum = rows.sums.maxima[r], *scores = buffers.scores + r * kTileKeys;
    const float before = maximum;
    maximum = std::max(cpu::largest(largest[r]), before);
    // While no key counts yet the maximum is -inf, and the difference to it would be NaN.
    const float subtrahend = maximum < -FLT_MAX ? 0 : maximum;
    corrections[r] = exp2_negative(splat<V>(before - subtrahend))[0];
    V total{};
    for (int key = 0; key < keys; key += kN) {
      const V e = exp2_negative(load<V, Dtype::f32>(scores, key) - subtrahend);
      total += e;
      store<Dtype::f32>(e * load<V, Dtype::f32>(buffers.v_scale, key), scores, key);
    }
    rows.sums.totals[r] = rows.sums.totals[r] * corrections[r] + sum(total);
    units[r] = pack<A>(scores, keys, 32767, buffers.words + r * kTileKeys);
  }
  constexpr int kVectors = (kN == 16 ? 4 : 2) / A::kElements;
  const int64_t stride = round_up(p.cache.head_dim, kColumnStep), vectors = words / kN;
  int64_t c = 0;
  for (; c + kVectors <= vectors; c += kVectors)
    add_values<A, R, kVectors>(tile, next, buffers.words, c, corrections, units, rows.sums.values, stride);
  if constexpr (kVectors > 1)
    for (; c < vectors; ++c)
      add_values<A, R, 1>(tile, next, buffers.words, c, corrections, units, rows.sums.values, stride);
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
    float** parts[] = {&q_,
                       &factors_,
                       &row_,
                       &copies_,
                       &sums_,
                       &buffers_.k_scale,
                       &buffers_.v_scale,
                       &buffers_.scores,
                       &buffers_.words};
    const int64_t sizes[] = {rows_ * columns_,
                             round_up(rows_, kMostLanes),
                             columns_,
                             4 * kTileKeys * columns_,
                             Sums::floats(rows_, p.cache.head_dim),
                             kTileKeys,
                             kTileKeys,
                             kMostRows * kTileKeys,
                             kMostRows * kTileKeys};
    float* next = scratch.get(std::accumulate(std::begin(sizes), std::end(sizes), int64_t{0}));
    for (int i = 0; i < 9; ++i) *parts[i] = next, next += sizes[i];
  }

  Sums own_sums() const { return Sums(sums_, rows_, p_.cache.head_dim); }

  // Fills in the sums of a head's rows, of keys of a sequence that is `length` long. What follows is prefetched.
  void run(const Keys& keys, int64_t length, const Sums& sums, const Keys& following) {
    const auto& [head, begin, end] = keys;
    std::fill_n(sums.values, rows_ * columns_, 0.0f);
    std::fill_n(sums.maxima, rows_, -INFINITY);
    std::fill_n(sums.totals, rows_, 0.0f);
    if (begin >= end) return;
    place_rows(head);
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
      if (copies_rows_) copy_rows(tile);
      place_scales(head, p_.cache.k_scale, tile, buffers_.k_scale);
      place_scales(head, p_.cache.v_scale, tile, buffers_.v_scale);
      for (int64_t first = 0; first < rows_; first += kMostRows) {
        Rows rows{q_ + first * words_, factors_ + first, words_, {}, {}, sums};
        const auto count = static_cast<int>(std::min<int64_t>(rows_ - first, kMostRows));
        rows.sums.values += first * columns_, rows.sums.maxima += first, rows.sums.totals += first;
        for (int r = 0; r < count; ++r) {
          const int64_t place = length - p_.rows + (first + r) % p_.rows - key;
          rows.low[r] = static_cast<int>(std::clamp<int64_t>(place - p_.left, 0, kTileKeys));
          rows.high[r] = static_cast<int>(std::clamp<int64_t>(place, -1, tile.n - 1));
        }
        with_rows(count, [&](auto count) __attribute__((always_inline)) {
          with_arithmetic(p_, [&]<class A>(A) __attribute__((always_inline)) {
            attend<A, count()>(p_, tile, next, rows, buffers_);
          });
        });
      }
    }
  }

 private:
  // The rows of q as words, and what scores have to be multiplied by.
  void place_rows(const Head& head) {
    with_arithmetic(p_, [&]<class A>(A) __attribute__((always_inline)) { place_rows<A>(head); });
  }
  template <class A>
  INLINE void place_rows(const Head& head) {
    using V = typename A::V;
    constexpr int64_t kStep = kLanes<V> * A::kElements;
    words_ = round_up(p_.cache.head_dim, kStep) / A::kElements;
    copies_rows_ = p_.cache.head_dim % kStep != 0;
    const int64_t columns = p_.cache.head_dim;
    // sums of products with int8 are less than 2^31
    const auto most = static_cast<float>(std::min<int64_t>(INT16_MAX, (int64_t{1} << 23) / columns_ - 1));
    std::fill_n(row_, columns_, 0.0f);
    for (int64_t row = 0; row < rows_; ++row) {
      const int64_t h = head.head * (rows_ / p_.rows) + row / p_.rows, i = row % p_.rows;
      const auto q = static_cast<const char*>(p_.q.data) +
                     (head.batch * p_.q.batch + i * p_.q.row + h * p_.q.head) * size_of(p_.dtype);
      with_float_dtype(p_.dtype, [&](auto dtype) __attribute__((always_inline)) {
        for_each_vector<V>(
            0, columns, VECTOR_BODY(&) { store<Dtype::f32>(load<V, decltype(dtype)::value>(q, c, n), row_, c, n); });
      });
      const float unit = pack<A>(row_, words_ * A::kElements, most, q_ + row * words_);
      factors_[row] = (p_.softcap > 0 ? p_.scale / p_.softcap : p_.scale * kLog2e) * unit;
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

  void copy_rows(Tile& tile) const {
    const int64_t bytes = p_.cache.head_dim * size_of(p_.cache.dtype);
    for (int i = 0; i < kTileKeys; ++i) {
      char* const to = reinterpret_cast<char*>(copies_ + i * 2 * columns_);
      std::memcpy(to, tile.k[i], bytes), std::memcpy(to + 4 * columns_, tile.v[i], bytes);
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
void finish(const Head& head, float* partial, int64_t count, int64_t stride) {
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
    const float inverse = total == 0 ? 0 : 1 / total;  // a row without keys is 0
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

}  // namespace
}  // namespace cpu

void attention_decode_cpu(const AttentionDecodeParams& p) {
  using namespace cpu;
  std::vector<Sequence> sequences(p.cache.batch);
  const int64_t heads = p.cache.heads, rows = Head{p, 0, 0}.rows(), columns = p.cache.head_dim;
  int64_t items = 0, keys = 0, most_splits = 1;
  for (int64_t b = 0; b < p.cache.batch; ++b) {
    const int64_t length = p.cache.seq_lens[b], begin = std::min<int64_t>(p.first_key(b), length);
    const int64_t splits = std::max<int64_t>((length - begin + kSplitKeys - 1) / kSplitKeys, 1);
    sequences[b] = {begin, length, splits, items};
    items += splits * heads, keys += length - begin;
    most_splits = std::max(most_splits, splits);
  }
  const int64_t stride = Sums::floats(rows, columns);
  thread_local Scratch workspace;
  float* const partials = most_splits > 1 ? workspace.get(stride * items) : nullptr;
  const int64_t work = keys * heads * columns * rows / items;
  torch::stable::parallel_for(0, items, (1 << 16) / (work + 1) + 1, [&](int64_t first, int64_t last) {
    Worker worker(p);
    int64_t b = 0;
    const auto keys_of = [&](int64_t item) {
      while (b + 1 < p.cache.batch && sequences[b + 1].first_item <= item) ++b;
      const auto [begin, end, splits, first_item] = sequences[b];
      const int64_t key = begin + (item - first_item) / heads * kSplitKeys;
      return Keys{{p, b, (item - first_item) % heads}, key, std::min(key + kSplitKeys, end)};
    };
    for (int64_t item = first; item < last; ++item) {
      const Keys keys = keys_of(item);
      const Sequence& sequence = sequences[b];
      const bool whole = sequence.splits == 1;
      const Sums sums = whole ? worker.own_sums() : Sums(partials + item * stride, rows, columns);
      worker.run(keys, sequence.end, sums, item + 1 < last ? keys_of(item + 1) : keys);
      if (whole) finish(keys.head, sums.values, 1, 0);
    }
  });
  if (most_splits == 1) return;
  torch::stable::parallel_for(0, p.cache.batch * heads, 4, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const Sequence& s = sequences[i / heads];
      if (s.splits > 1)
        finish({p, i / heads, i % heads}, partials + (s.first_item + i % heads) * stride, s.splits, heads * stride);
    }
  });
}

}  // namespace forwardpass
