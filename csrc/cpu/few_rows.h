#pragma once
// Few rows of a times b [N, K] as it is in memory, whose bytes bind: they are read once, and sixteen rows of b stay in
// L1 or L2 for all of a's. Each product is a sum over the lanes of a vector; four of those are added up at a time.
//
// A tier's Dot says how:
//   Sums, Wide      vectors of partial sums, and of kStep elements of b as they are multiplied
//   kBytes          of an element of a
//   kBytesOfB       of one of b: 1, but of a copy that is in a cache 2
//   kSums           how many Sums the registers hold
//   widen(b)        kStep elements of b
//   add(sums, a, wide)
#include <algorithm>
#include <type_traits>
#include <utility>

#include "cpu/memory.h"
#include "cpu/row_chunks.h"
#include "cpu/vector.h"
#include "torch/check.h"

namespace forwardpass::cpu {

// b is prefetched a line at a time, so many bytes ahead, into L2. GB a second of one core of a Zen 4 from memory, one
// row by VNNI, K of 576 and 4096: by the hardware alone 7 and 14.6, prefetched into L1 8.6 and 14.5, into L2 15 and 19.
// 8 KB and 64 KB ahead are each slower for one of the two.
constexpr int kLine = 64, kAhead = 16384, kToL2 = 2;
constexpr int64_t kGroupColumns = 16;  // of the product: rows of b; an epilogue begins at multiples of them

// The sums over the lanes of four vectors.
template <class V>
INLINE auto sums_of_lanes(V a, V b, V c, V d) {
  constexpr int kOther = kLanes<V>;
  // Within 128 bits: a0 + a2, b0 + b2, a1 + a3, b1 + b3
  const auto by_elements = [](V x, V y) __attribute__((always_inline)) {
    return permute<[](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kOther; }>(x, y) +
           permute<[](int i) { return i / 4 * 4 + i % 4 / 2 + i % 2 * kOther + 2; }>(x, y);
  };
  const V ab = by_elements(a, b), cd = by_elements(c, d);
  const V abcd = permute<[](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kOther; }>(ab, cd) +
                 permute<[](int i) { return i / 4 * 4 + i % 2 + i % 4 / 2 * kOther + 2; }>(ab, cd);
  if constexpr (kLanes<V> == 16) {
    const auto half = __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3, 4, 5, 6, 7) +
                      __builtin_shufflevector(abcd, abcd, 8, 9, 10, 11, 12, 13, 14, 15);
    return __builtin_shufflevector(half, half, 0, 1, 2, 3) + __builtin_shufflevector(half, half, 4, 5, 6, 7);
  } else if constexpr (kLanes<V> == 8) {
    return __builtin_shufflevector(abcd, abcd, 0, 1, 2, 3) + __builtin_shufflevector(abcd, abcd, 4, 5, 6, 7);
  } else {
    return abcd;
  }
}

// kRows rows of a by kColumns of b.
template <class Dot, int kRows, int kColumns>
struct Tile {
  typename Dot::Sums sums[kRows][kColumns] = {};

  // Adds the products of K's columns from `begin` to `end`; a is zero from there to the next multiple of kStep.
  INLINE void add(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride, int64_t begin, int64_t end) {
    int64_t k = begin;
    for (; k + kLine <= end; k += kLine) {
      if constexpr (Dot::kBytesOfB == 1) {
#pragma GCC unroll 4
        for (int j = 0; j < kColumns; ++j) __builtin_prefetch(b + j * b_stride + k + kAhead, 0, kToL2);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kLine; i += Dot::kStep) step(a, a_stride, b, b_stride, k + i);
    }
    for (; k + Dot::kStep <= end; k += Dot::kStep) step(a, a_stride, b, b_stride, k);
    if (k == end) return;
    constexpr int kBytes = Dot::kStep * Dot::kBytesOfB;
    uint8_t rest[kColumns][kBytes] = {};
    for (int j = 0; j < kColumns; ++j)
      std::memcpy(rest[j], b + j * b_stride + k * Dot::kBytesOfB, (end - k) * Dot::kBytesOfB);
    step(a + k * Dot::kBytes, a_stride, rest[0], kBytes, 0);
  }

  // Adds another tile's sums, a column's times scale(column).
  template <class F>
  INLINE void add_scaled(const Tile& part, F scale) {
    unrolled<kColumns>(UNROLLED_BODY(j) {
      const float s = scale(j);
      unrolled<kRows>(UNROLLED_BODY(i) { sums[i][j] += part.sums[i][j] * s; });
    });
  }

  // to[i * stride + j] = the sums over lanes. terms: [kRows], what is added to integers of a row, modulo 2^32.
  template <class T>
  INLINE void store(T* to, int64_t stride, const uint32_t* terms = nullptr) const {
    constexpr int kCount = kRows * kColumns;
    unrolled<(kCount + 3) / 4>(UNROLLED_BODY(group) {
      constexpr int kFirst = group * 4, kLast = std::min(kFirst + 4, kCount);
      auto four = sums_of_lanes(at(kFirst), at(kFirst + 1), at(kFirst + 2), at(kFirst + 3));
      if constexpr (std::is_same_v<T, int32_t>) {
        Vectors<4>::u32 added{};
        unrolled<kLast - kFirst>(UNROLLED_BODY(i) { added[i()] = terms[(kFirst + i) / kColumns]; });
        four = bits<Vectors<4>::i32>(bits<Vectors<4>::u32>(four) + added);
      }
      if constexpr (kColumns == 4) {  // neighbours; lane by lane 8 to 48 rows took up to 1.1 times as long
        std::memcpy(to + group * stride, &four, sizeof(four));
      } else {
        unrolled<kLast - kFirst>(UNROLLED_BODY(i) {
          constexpr int kRow = (kFirst + i) / kColumns, kColumn = (kFirst + i) % kColumns;
          to[kRow * stride + kColumn] = four[i()];
        });
      }
    });
  }

 private:
  // From column k of K on. Strides are in bytes.
  INLINE void step(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t b_stride, int64_t k) {
    a += k * Dot::kBytes, b += k * Dot::kBytesOfB;
    typename Dot::Wide wide[kColumns];
    unrolled<kColumns>(UNROLLED_BODY(j) { wide[j] = Dot::widen(b + j * b_stride); });
    unrolled<kRows * kColumns>(UNROLLED_BODY(i) {
      Dot::add(sums[i / kColumns][i % kColumns], a + i / kColumns * a_stride, wide[i % kColumns]);
    });
  }
  INLINE typename Dot::Sums at(int i) const {
    return i < kRows * kColumns ? sums[i / kColumns][i % kColumns] : typename Dot::Sums{};
  }
};

// Calls tile(rows, columns, i, j), the first two constants, for tiles of `rows` rows of a and b's from `first` to
// `last`.
template <class Dot, class F>
INLINE void for_each_tile(int64_t rows, int64_t first, int64_t last, F tile) {
  for (int64_t begin = first; begin < last; begin += kGroupColumns) {
    const int64_t end = std::min(last, begin + kGroupColumns);
    int64_t i = 0;
    const auto by_rows = [&](auto tile_rows) __attribute__((always_inline)) {
      constexpr int kRows = decltype(tile_rows)::value, kColumns = std::min(4, Dot::kSums / kRows);
      for (; i + kRows <= rows; i += kRows) {
        int64_t j = begin;
        for (; j + kColumns <= end; j += kColumns) tile(tile_rows, std::integral_constant<int, kColumns>{}, i, j);
        for (; j < end; ++j) tile(tile_rows, std::integral_constant<int, 1>{}, i, j);
      }
    };
    by_rows(std::integral_constant<int, 4>{});
    by_rows(std::integral_constant<int, 2>{});
    by_rows(std::integral_constant<int, 1>{});
  }
}

// The columns from `begin`, a multiple of kGroupColumns, to `end` of the product of `rows` rows and of its epilogue:
// multiply(first, last, sums, stride) gives the sums of some of them, as many as stay in L1.
template <Dtype kAcc, class F>
void multiply_columns(int64_t rows, int64_t begin, int64_t end, const Epilogue& epilogue, F multiply) {
  using T = std::conditional_t<kAcc == Dtype::i32, int32_t, float>;
  const int64_t chunk = rows > 4 ? 256 : 1024;
  const CacheLines buffer = allocate(rows * chunk * sizeof(T));
  auto sums = reinterpret_cast<T*>(buffer[0].bytes);
  for (int64_t first = begin; first < end; first += chunk) {
    const int64_t last = std::min(end, first + chunk);
    multiply(first, last, sums, chunk);
    dequant_activation_cpu({{sums, kAcc, rows, last - first, chunk}, columns_from(epilogue, first)});
  }
}

constexpr int64_t kLeastProducts = 262144;  // of a thread, about 5 us

// All columns, by threads that take some.
template <Dtype kAcc, class F>
void multiply_few_rows(int64_t rows, const Matrix& b, const Epilogue& epilogue, F multiply) {
  const int64_t groups = (b.rows + kGroupColumns - 1) / kGroupColumns;
  torch::stable::parallel_for(
      0, groups, kLeastProducts / (kGroupColumns * b.columns * rows) + 1, [&](int64_t begin, int64_t end) {
        multiply_columns<kAcc>(rows, begin * kGroupColumns, std::min(b.rows, end * kGroupColumns), epilogue, multiply);
      });
}

}  // namespace forwardpass::cpu
