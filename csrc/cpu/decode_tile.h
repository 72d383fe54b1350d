#pragma once
// attention_decode on a CPU: some rows against a tile of keys.
#include <algorithm>
#include <cfloat>

#include "cpu/activation.h"
#include "cpu/words.h"
#include "params/attention_decode.h"
#include "torch/check.h"

namespace forwardpass::cpu {

constexpr int kTileKeys = 64;
constexpr int kMostRows = 4;
constexpr int64_t kColumnStep = 2 * kMostLanes;  // what columns are padded to: a vector of pairs
using Four = Vectors<kMostRows>::f32;            // one number of each row

// The sums of an item's rows, maxima in units of log2(e).
struct Sums {
  float* values;           // [rows][padded columns]
  float *maxima, *totals;  // of kMostRows rows at a time

  static int64_t floats(int64_t rows, int64_t columns) {
    return round_up(rows * round_up(columns, kColumnStep) + 2 * round_up(rows, kMostRows), kMostLanes);
  }
  Sums(float* memory, int64_t rows, int64_t columns)
      : values(memory),
        maxima(memory + rows * round_up(columns, kColumnStep)),
        totals(maxima + round_up(rows, kMostRows)) {}
};

// One head of the cache, and the rows that read it: query head by query head, each with `count` of its sequence, from
// `first` on.
struct Head {
  const AttentionDecodeParams& p;
  int64_t batch, head, first, count;

  int64_t rows() const { return p.heads / p.cache.heads * count; }
  int64_t q_head(int64_t row) const { return head * (p.heads / p.cache.heads) + row / count; }
  int64_t row_of_sequence(int64_t row) const { return first + row % count; }

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

// Keys from `begin` to `end` of a head, or of several from that one on.
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
  // Its values, with zeros as those of all keys but the ones from low to high.
  __attribute__((noinline)) Tile values_between(int low, int high, const char* zeros) const {
    Tile seen;
    seen.n = high + 1;
    for (int i = 0; i < kTileKeys; ++i) seen.v[i] = i < low || i > high ? zeros : v[i];
    return seen;
  }
  // The same keys of the next head, so many bytes further on.
  void next_head(int64_t k_bytes, int64_t v_bytes) {
    for (int i = 0; i < kTileKeys; ++i) k[i] += k_bytes, v[i] += v_bytes;
  }
  // One head's share of the rows that all of them have, in the order of memory.
  void find_share(const Tile& first, int64_t head, int64_t heads, int64_t k_bytes, int64_t v_bytes) {
    int64_t row = head * kTileKeys / heads, in_row = head * kTileKeys % heads;
    for (int i = 0; i < kTileKeys; ++row, in_row = 0) {
      const int n = static_cast<int>(std::min<int64_t>(heads - in_row, kTileKeys - i));
      const char *k_row = first.k[row] + in_row * k_bytes, *v_row = first.v[row] + in_row * v_bytes;
      for (const int end = i + n; i < end; ++i, k_row += k_bytes, v_row += v_bytes) k[i] = k_row, v[i] = v_row;
    }
  }

 private:
  INLINE void find_rows(const Head& head, const CacheTensor& t, int64_t size, const char** rows) const {
    head.for_each_run(t, size, key, n, [&](const char* row, int i, int end) {
      for (; i < end; ++i, row += t.row * size) rows[i] = row;
    });
    std::fill(rows + n, rows + kTileKeys, rows[n - 1]);
  }
};

// Lane i of every second unit of a and, behind it, b, within groups of as many lanes.
constexpr int every_second(int i, int lanes, int group, int unit) {
  const int half = group / 2, in_half = i % half;
  return i / group * group + in_half / unit * 2 * unit + in_half % unit + (i % group < half ? 0 : lanes);
}
// f of two neighbours, or of every fourth lanes, a's and b's. The shuffles are one instruction each.
template <int Level, class V, class S, class F>
INLINE S fold_pair(S x, S y, F f) {
  constexpr int kUnit = Level < 2 ? 1 : 4, kGroup = Level < 2 ? 4 : kLanes<V>;
  const V a = bits<V>(x), b = bits<V>(y);
  return f(bits<S>(permute<[](int i) { return every_second(i, kLanes<V>, kGroup, kUnit); }>(a, b)),
           bits<S>(permute<[](int i) { return every_second(i, kLanes<V>, kGroup, kUnit) + kUnit; }>(a, b)));
}
// x[0]: in lane i the sum of x[i]'s lanes, at Level 0; levels may be taken one after the other.
template <class V, int N, int Level, class S>
INLINE void fold(S* x) {
  if constexpr (N > 1) {
    unrolled<N / 2>(UNROLLED_BODY(i) { x[i] = fold_pair<Level, V>(x[2 * i], x[2 * i + 1], kAdd); });
    fold<V, N / 2, Level + 1>(x);
  }
}
// Each row's lanes reduced by f, of all rows at once: one after the other their instructions wait for each other. For
// every number of rows the lanes are added in one order: neighbours, pairs of them, then fours. So a row's bits do not
// depend on how many rows it is computed with, which in decoder_layer depends on the number of threads.
template <int R, class S, class F>
INLINE auto of_rows(const S (&x)[R], F f) {
  using V = typename Vectors<kLanes<S>>::f32;
  if constexpr (R == 1) {
    const S pairs = f(x[0], permute<[](int i) { return i ^ 1; }>(x[0], x[0]));
    return fours(f(pairs, permute<[](int i) { return i ^ 2; }>(pairs, pairs)), f);
  } else {
    const S a = fold_pair<0, V>(x[0], x[1], f), b = R == 2 ? a : fold_pair<0, V>(x[R == 2 ? 0 : 2], x[R - 1], f);
    return fours(fold_pair<1, V>(a, b, f), f);
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

// Whether words are integers, whose range has to be known.
template <class A>
constexpr bool kIntegers = A::kDtype == Dtype::i8 && A::kElements > 1;

// R rows of a head, which see the keys from low to high of a tile.
struct Rows {
  const float* q;        // [R][words]
  const float* factors;  // [R], of scores
  int64_t words;
  int low[kMostRows], high[kMostRows];
  int all_low, all_high;                     // that all rows see
  bool see_keys;                             // any of them any
  float place[kMostRows], slope[kMostRows];  // where it stands, from the tile's first key on; ALiBi's, times log2(e)
  Sums sums;                                 // the first row's

  bool sees_all(int r, int first, int last) const { return low[r] <= first && high[r] >= last; }
};

// Lanes of keys from `key` on that row r sees, and what the others are.
template <class V>
INLINE V seen(const Rows& rows, int r, int key, V v, float other) {
  if (rows.sees_all(r, key, key + kLanes<V> - 1)) return v;
  return between(lane_numbers<V>() + key, rows.low[r], rows.high[r], v, other);
}

// What a tile's scores and values are multiplied by, scores that become probabilities, and these as words;
// [kMostRows][kTileKeys] those by row.
struct Buffers {
  float *k_scale, *v_scale, *scores, *words;
  const char* zeros;  // a row of the cache
};
// What rows are multiplied by: sums so far, and products of words.
struct Factors {
  Four corrections, units;
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
INLINE void add_values(const Tile& tile, const Tile& next, const float* p, int64_t vector, const Factors& factors,
                       float* sums, int64_t stride) {
  using V = typename A::V;
  using Sum = typename A::Sum;
  constexpr int kE = A::kElements, kN = kLanes<V>;
  constexpr int kBytes = C * kN * kE * static_cast<int>(size_of(A::kDtype));
  Sum x[R * C * kE]{};
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
  unrolled<R * C>(UNROLLED_BODY(i) {
    constexpr int r = i / C, c = i % C;
    float* to = sums + r * stride + (vector + c) * kN * kE;
    V y = floats<V>(x[i * kE]) * factors.units[r];
    if constexpr (kE == 2) {
      V high = floats<V>(x[i * kE + 1]) * factors.units[r];
      put_in_order(y, high);
      store<Dtype::f32>(load<V, Dtype::f32>(to, kN) * factors.corrections[r] + high, to, kN);
    }
    store<Dtype::f32>(load<V, Dtype::f32>(to, 0) * factors.corrections[r] + y, to, 0);
  });
}

// x [R][keys of V] = q k
template <class A, int R, class V = typename A::V>
INLINE void multiply_keys(const Tile& tile, const Tile& next, int key, const Rows& rows, int64_t row_bytes, V (&x)[R]) {
  using Sum = typename A::Sum;
  constexpr int kN = kLanes<V>, kKeys = kN == 16 ? 4 : 2;  // whose sums are in registers together
  Sum sums[R][kN / kKeys];
  for (int i = 0; i < kN; i += kKeys) {
    Sum s[R][kKeys]{};
    const char* const* k = tile.k + key + i;
    for (int64_t w = 0; w < rows.words / kN; ++w) {
      V row[kKeys];
      unrolled<kKeys>(UNROLLED_BODY(j) { row[j] = A::load_words(k[j], w); });
      unrolled<R>(UNROLLED_BODY(r) {
        const V q = load<V, Dtype::f32>(rows.q + r * rows.words, w * kN);
        unrolled<kKeys>(UNROLLED_BODY(j) { s[r][j] = A::multiply_add(q, row[j], s[r][j]); });
      });
    }
    unrolled<R>(UNROLLED_BODY(r) {
      fold<V, kKeys, 0>(s[r]);
      sums[r][i / kKeys] = s[r][0];
    });
    for (int64_t b = 0; b < row_bytes; b += 64)
      unrolled<kKeys>(UNROLLED_BODY(j) { prefetch(next.k[key + i + j] + b); });
  }
  unrolled<R>(UNROLLED_BODY(r) {
    fold<V, kN / kKeys, kKeys == 4 ? 2 : 1>(sums[r]);
    x[r] = floats<V>(sums[r][0]);
  });
}

// Scores of R rows, as if these saw all keys; the largest of each.
template <class A, int R>
INLINE Four find_scores(const AttentionDecodeParams& p, const Tile& tile, const Tile& next, const Rows& rows,
                        const Buffers& buffers) {
  using V = typename A::V;
  V largest[R];
  unrolled<R>(UNROLLED_BODY(r) { largest[r] = splat<V>(-INFINITY); });
  for (int key = 0; key < tile.n; key += kLanes<V>) {
    V x[R];
    multiply_keys<A, R>(tile, next, key, rows, p.cache.head_dim * size_of(A::kDtype), x);
    const V k_scale = load<V, Dtype::f32>(buffers.k_scale, key);
    unrolled<R>(UNROLLED_BODY(r) {
      const V s = x[r] * (k_scale * rows.factors[r]);
      store<Dtype::f32>(s, buffers.scores + r * kTileKeys, key);
      largest[r] = max(s, largest[r]);
    });
  }
  return of_rows(largest, kMax);
}

// Scores as options change them, -inf those of keys that a row does not see; the largest of each of `count` rows. In
// the loop of find_scores g++ made copies of that for each option.
template <class V>
INLINE Four change_scores(const AttentionDecodeParams& p, const Tile& tile, const Rows& rows, int count,
                          const Buffers& buffers) {
  float most[kMostRows]{};
  apart<V>(APART_CODE {
    for (int r = 0; r < count; ++r) {
      V largest[1]{splat<V>(-INFINITY)};
      for (int key = 0; key < tile.n; key += kLanes<V>) {
        float* const scores = buffers.scores + r * kTileKeys;
        const auto j = lane_numbers<V>() + key;
        V s = load<V, Dtype::f32>(scores, key);
        if (p.softcap > 0) s = tanh(s) * (p.softcap * kLog2e);
        if (p.alibi_slopes) s -= abs(rows.place[r] - __builtin_convertvector(j, V)) * rows.slope[r];
        s = seen(rows, r, key, s, -INFINITY);
        store<Dtype::f32>(s, scores, key);
        largest[0] = max(s, largest[0]);
      }
      most[r] = of_rows(largest, kMax)[0];
    }
  });
  return load<Four, Dtype::f32>(most, 0);
}

// Four numbers as V, whose fma has the tier's instructions, and back.
template <class V>
INLINE V repeated(Four x) {
  return [&]<int... I>(std::integer_sequence<int, I...>) __attribute__((always_inline)) {
    return __builtin_shufflevector(x, x, I % kMostRows...);
  }(std::make_integer_sequence<int, kLanes<V>>{});
}
template <class V>
INLINE Four first_four(V x) {
  return __builtin_shufflevector(x, x, 0, 1, 2, 3);
}

// Scores become probabilities, times v_scale, as A's words.
template <class A, int R>
INLINE Factors find_probabilities(const Tile& tile, Four largest, const Rows& rows, const Buffers& buffers) {
  using V = typename A::V;
  constexpr int kN = kLanes<V>;
  const int keys = static_cast<int>(round_up(tile.n, kN));
  const Sums& sums = rows.sums;
  const Four before = load<Four, Dtype::f32>(sums.maxima, 0), maxima = max(largest, before);
  // While no key counts yet the maximum is -inf, and the difference to it would be NaN.
  const Four subtrahends = select_less(maxima, splat<Four>(-FLT_MAX), Four{}, maxima);
  Factors factors{first_four(exp2_negative(repeated<V>(before - subtrahends))), splat<Four>(1.0f)};
  store<Dtype::f32>(maxima, sums.maxima, 0);
  V totals[R];
  Ints<V> ranges[R];
  unrolled<R>(UNROLLED_BODY(r) { totals[r] = V{}, ranges[r] = Ints<V>{}; });
  for (int key = 0; key < keys; key += kN) {
    const V v_scale = load<V, Dtype::f32>(buffers.v_scale, key);
    unrolled<R>(UNROLLED_BODY(r) {
      const V e = exp2_negative(load<V, Dtype::f32>(buffers.scores + r * kTileKeys, key) - subtrahends[r()]);
      totals[r] += e;
      const V x = seen(rows, r(), key, e * v_scale, 0);  // not the NaN of 0 and a scale
      if constexpr (kIntegers<A>) {
        // As integers, of which a NaN's is beyond infinity's.
        ranges[r] = max(bits<Ints<V>>(abs(x)), ranges[r]);
        store<Dtype::f32>(x, buffers.scores + r * kTileKeys, key);
      } else {
        A::store_probabilities(x, buffers.words + r * kTileKeys, key);
      }
    });
  }
  store<Dtype::f32>(load<Four, Dtype::f32>(sums.totals, 0) * factors.corrections + of_rows(totals, kAdd), sums.totals,
                    0);
  if constexpr (kIntegers<A>) {
    const Four range = bits<Four>(of_rows(ranges, kMax));
    const Four inverses = select_less(Four{}, range, A::kMost / range, Four{});
    factors.units = range * (1 / A::kMost) + range * 0;  // NaN of an infinity or a NaN
    for (int key = 0; key < keys; key += kN)
      unrolled<R>(UNROLLED_BODY(r) {
        const V x = load<V, Dtype::f32>(buffers.scores + r * kTileKeys, key) * inverses[r()];
        // in the low bits the integer, as its range is known
        A::store_integers(bits<Ints<V>>(x + 0x1.8p23f) - bits<int32_t>(0x1.8p23f), buffers.words + r * kTileKeys, key);
      });
  }
  return factors;
}

// Vectors of words of a row of v.
template <class A>
INLINE int64_t value_vectors(const AttentionDecodeParams& p) {
  constexpr int kElements = kLanes<typename A::V> * A::kElements;
  return round_up(p.cache.value_dim, kElements) / kElements;
}

// Whether the values of keys from `begin` to `end` are.
template <class A, class V = typename A::V>
INLINE bool are_finite(const AttentionDecodeParams& p, const Tile& tile, int begin, int end) {
  if (A::kDtype == Dtype::i8 || begin >= end) return true;
  bool finite = true;
  apart<V>(APART_CODE {
    Ints<V> largest{};  // magnitudes as integers, of which those of infinities and NaNs are the largest
    for (int j = begin; j < end; ++j)
      for (int64_t i = 0; i < value_vectors<A>(p); ++i) {
        const auto words = bits<Uints<V>>(A::load_words(tile.v[j], i));
        largest = max(bits<Ints<V>>(words & 0x7fffffff), largest);
        if constexpr (A::kElements == 2) largest = max(bits<Ints<V>>(words << 16 & 0x7fffffff), largest);
      }
    finite = cpu::largest(largest) < bits<int32_t>(INFINITY);
  });
  return finite;
}

// sums [R, columns] = sums * correction + unit * p v
template <class A, int R>
INLINE void add_values(const AttentionDecodeParams& p, const Tile& tile, const Tile& next, const float* words,
                       const Factors& factors, float* sums) {
  const int64_t stride = round_up(p.cache.value_dim, kColumnStep), vectors = value_vectors<A>(p);
  constexpr int kVectors = (kLanes<typename A::V> == 16 ? 4 : 2) / A::kElements;
  int64_t c = 0;
  for (; c + kVectors <= vectors; c += kVectors)
    add_values<A, R, kVectors>(tile, next, words, c, factors, sums, stride);
  if constexpr (kVectors > 1)
    for (; c < vectors; ++c) add_values<A, R, 1>(tile, next, words, c, factors, sums, stride);
}

// The same for row r alone, with zeros for the values of keys that it does not see.
template <class A>
INLINE void add_seen_values(const AttentionDecodeParams& p, const Tile& tile, const Tile& next, const Rows& rows, int r,
                            const Buffers& buffers, const Factors& factors) {
  apart<typename A::V>(APART_CODE {
    const Tile seen = tile.values_between(rows.low[r], rows.high[r], buffers.zeros);
    const Factors row_factors{splat<Four>(factors.corrections[r]), splat<Four>(factors.units[r])};
    float* const sums = rows.sums.values + r * round_up(p.cache.value_dim, kColumnStep);
    add_values<A, 1>(p, seen, next, buffers.words + r * kTileKeys, row_factors, sums);
  });
}

// R rows against a tile, while a part of the next one is prefetched. 0 * NaN is NaN: where a value that not all rows
// see is not finite, each row adds values by itself, with zeros for those of keys that it does not see. To do so in
// every tile that not all rows see took 1.1 to 1.4 times as long with 4 and 8 rows; looking costs 8 rows of 16
// keys 8 %.
template <class A, int R>
INLINE void attend(const AttentionDecodeParams& p, const Tile& tile, const Tile& next, const Rows& rows,
                   const Buffers& buffers) {
  using V = typename A::V;
  Four largest = find_scores<A, R>(p, tile, next, rows, buffers);
  const bool sees_all = rows.all_low == 0 && rows.all_high == round_up(tile.n, kLanes<V>) - 1;
  if (!sees_all || p.softcap > 0 || p.alibi_slopes) largest = change_scores<V>(p, tile, rows, R, buffers);
  const Factors factors = find_probabilities<typename A::Words, R>(tile, largest, rows, buffers);
  if (are_finite<A>(p, tile, 0, rows.all_low) && are_finite<A>(p, tile, rows.all_high + 1, tile.n))
    return add_values<A, R>(p, tile, next, buffers.words, factors, rows.sums.values);
  for (int r = 0; r < R; ++r) add_seen_values<A>(p, tile, next, rows, r, buffers, factors);
}

}  // namespace forwardpass::cpu
