#pragma once
// Products of unsigned and signed bytes, summed exactly to int32: of four bytes of a row, broadcast, with four of each
// column of a panel.
#include "cpu/vnni.h"

namespace forwardpass::cpu {

// What an arithmetic tells: Unsigned, four bytes of a row in all lanes, and Signed, those of the columns of a vector,
// as `add` takes them; kVectors of a panel by kRows rows are as many sums as registers hold. kDepth: bytes of a row
// that it takes at a time. Setup: what there must be while it multiplies rows of so many bytes.
struct ByteProducts {
  static constexpr int kDepth = 4;
  struct Setup {
    INLINE explicit Setup(int64_t) {}
  };
};

#if defined(__x86_64__)
template <int kWidth, bool kVex = false>
struct VnniBytes : ByteProducts, Vnni<kWidth, kVex> {
  using Isa = Vnni<kWidth, kVex>;
  using Sums = typename Isa::Ints;
  using Unsigned = Sums;
  using Signed = Sums;
  static constexpr int kRows = kWidth == 16 ? 6 : 4, kVectors = kWidth == 16 ? 4 : 2;
  INLINE static Unsigned unsigned_bytes(const uint8_t* p) { return Isa::broadcast(p); }
  INLINE static Signed signed_bytes(const int8_t* p) { return Isa::load(p); }
  INLINE static void add(Sums& sums, Unsigned a, Signed b) { Isa::add_products(sums, a, b); }
};

// By vpmaddwd, of even and of odd bytes as 16 bits. vpmaddubsw would saturate: two products are up to 2 * 255 * 127.
template <int kWidth>
struct WidenedBytes : ByteProducts {
  using Sums = typename Vectors<kWidth>::i32;
  struct Unsigned {
    Sums even, odd;
  };
  using Signed = Unsigned;
  static constexpr int kRows = kWidth == 16 ? 6 : 4, kVectors = kWidth == 16 ? 2 : 1;
  INLINE static Unsigned unsigned_bytes(const uint8_t* p) {
    const Sums v = Vnni<kWidth>::broadcast(p), odd = shift<false>(v);
    return {v & 0x00ff00ff, odd};
  }
  INLINE static Signed signed_bytes(const int8_t* p) {
    const Sums v = Vnni<kWidth>::load(p);
    Sums even;
    asm("vpsllw $8, %1, %0" : "=v"(even) : "v"(v));
    return {shift<true>(even), shift<true>(v)};
  }
  INLINE static void add(Sums& sums, Unsigned a, Signed b) {
    Sums even, odd;
    asm("vpmaddwd %2, %1, %0" : "=v"(even) : "v"(a.even), "v"(b.even));
    asm("vpmaddwd %2, %1, %0" : "=v"(odd) : "v"(a.odd), "v"(b.odd));
    sums += even + odd;
  }

 private:
  template <bool kSigned>
  INLINE static Sums shift(Sums v) {
    Sums to;
    if constexpr (kSigned) {
      asm("vpsraw $8, %1, %0" : "=v"(to) : "v"(v));
    } else {
      asm("vpsrlw $8, %1, %0" : "=v"(to) : "v"(v));
    }
    return to;
  }
};
#endif

// Without instructions for it.
struct PlainBytes : ByteProducts {
  using Sums = Vectors<4>::i32;
  using Unsigned = const uint8_t*;
  using Signed = const int8_t*;
  static constexpr int kRows = 4, kVectors = 1;
  INLINE static Unsigned unsigned_bytes(const uint8_t* p) { return p; }
  INLINE static Signed signed_bytes(const int8_t* p) { return p; }
  INLINE static void add(Sums& sums, Unsigned a, Signed b) {
    for (int i = 0; i < 16; ++i) sums[i / 4] += a[i % 4] * b[i];
  }
};

// kRows rows of bytes times kVectors vectors of a panel's columns, [depth / 4][columns][4]. begin(vector) are the sums
// to begin with; finish(row, vector, sums).
template <class A, int kRows, int kVectors, class Begin, class Finish>
INLINE void multiply_tile(const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t panel_row, int64_t depth,
                          Begin begin, Finish finish) {
  constexpr int64_t kBytes = sizeof(typename A::Sums);
  typename A::Sums sums[kRows][kVectors];
  unrolled<kRows * kVectors>(UNROLLED_BODY(i) { sums[i / kVectors][i % kVectors] = begin(i % kVectors); });
  for (int64_t d = 0; d < depth; d += 4, panel += panel_row) {
    typename A::Signed columns[kVectors];
    unrolled<kVectors>(UNROLLED_BODY(j) { columns[j] = A::signed_bytes(panel + j * kBytes); });
    unrolled<kRows>(UNROLLED_BODY(r) {
      const typename A::Unsigned row = A::unsigned_bytes(a + r * a_stride + d);
      unrolled<kVectors>(UNROLLED_BODY(j) { A::add(sums[r][j], row, columns[j]); });
    });
  }
  unrolled<kRows * kVectors>(
      UNROLLED_BODY(i) { finish(i / kVectors, i % kVectors, sums[i / kVectors][i % kVectors]); });
}

// As multiply_tile, of the first `vectors` of the panel and of `rows` rows, at most A::kRows.
template <class A, class Begin, class Finish>
INLINE void multiply_bytes(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* panel, int64_t panel_row,
                           int64_t depth, int64_t vectors, Begin begin, Finish finish) {
  const auto columns = [&]<int kVectors>(int64_t j,
                                         std::integral_constant<int, kVectors>) __attribute__((always_inline)) {
    const auto tile = [&]<int kRows>(int64_t i, std::integral_constant<int, kRows>) __attribute__((always_inline)) {
      multiply_tile<A, kRows, kVectors>(
          a + i * a_stride, a_stride, panel + j * static_cast<int64_t>(sizeof(typename A::Sums)), panel_row, depth,
          [&](int64_t v) __attribute__((always_inline)) { return begin(j + v); },
          [&](int64_t r, int64_t v, auto sums) __attribute__((always_inline)) { finish(i + r, j + v, sums); });
    };
    if (rows == A::kRows) return tile(0, std::integral_constant<int, A::kRows>{});
    for (int64_t i = 0; i < rows; ++i) tile(i, std::integral_constant<int, 1>{});
  };
  int64_t j = 0;
  for (; j + A::kVectors <= vectors; j += A::kVectors) columns(j, std::integral_constant<int, A::kVectors>{});
  if constexpr (A::kVectors > 2)
    if (j + 2 <= vectors) columns(j, std::integral_constant<int, 2>{}), j += 2;
  if constexpr (A::kVectors > 1)
    if (j < vectors) columns(j, std::integral_constant<int, 1>{});
}

}  // namespace forwardpass::cpu
