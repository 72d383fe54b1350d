#pragma once
// byte_products.h on AMX tiles: 16 rows by the 64 columns of a panel, in four tiles of sums.
#include <concepts>

#include "cpu/byte_products.h"

#if defined(__x86_64__)
namespace forwardpass::cpu {

constexpr int kTilePanel = 64;  // columns of a panel

// 16 rows of bytes times a panel's columns, [depth / 4][64][4], to `sums`, [16][64]. Tiles must be open for the depth,
// or the depth be whole tiles of 64 bytes; all 16 rows and 64 columns are read.
void multiply_byte_tiles(const uint8_t* a, int64_t a_stride, const int8_t* panel, int64_t panel_row, int64_t depth,
                         int32_t* sums);

void configure_byte_tiles(int64_t depth);
void release_byte_tiles();

struct AmxBytes {
  static constexpr int kRows = 16, kDepth = 64;

  // While there is one, this thread's tiles have shapes: whole ones, and what is left of `depth` beside these. A
  // configuration takes as long as twelve products of tiles, so there is one for all products of a chunk of rows.
  struct Setup {
    explicit Setup(int64_t depth) { configure_byte_tiles(depth); }
    ~Setup() { release_byte_tiles(); }
    Setup(const Setup&) = delete;
    Setup& operator=(const Setup&) = delete;
  };
};

// The sums go through memory, as there is no way from a tile to a register: 64 loads for 16 rows, beside the thousands
// of instructions that their softmax takes.
template <std::same_as<AmxBytes> A, class Begin, class Finish>
INLINE void multiply_bytes(const uint8_t* a, int64_t a_stride, int64_t rows, const int8_t* panel, int64_t panel_row,
                           int64_t depth, int64_t vectors, Begin begin, Finish finish) {
  using Sums = Vectors<16>::i32;
  alignas(64) int32_t sums[A::kRows][kTilePanel];
  multiply_byte_tiles(a, a_stride, panel, panel_row, depth, sums[0]);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t v = 0; v < vectors; ++v) finish(r, v, begin(v) + Vnni<16>::load(sums[r] + v * kLanes<Sums>));
}

}  // namespace forwardpass::cpu
#endif

namespace forwardpass::cpu {

// Calls f with the arithmetic of this tier, for vectors like V.
template <class V, class F>
INLINE void with_byte_products(F f) {
#if defined(__x86_64__)
  if constexpr (kLanes<V> == 16) {
    if (tier() == Tier::amx) return f(AmxBytes{});
    if (tier() == Tier::avx512_vnni) return f(VnniBytes<16>{});
    return f(WidenedBytes<16>{});
  } else if constexpr (kLanes<V> == 8) {
    if (tier() == Tier::avx2) return f(WidenedBytes<8>{});
    if (has_avx_vnni()) return f(VnniBytes<8, true>{});
    return f(VnniBytes<8, false>{});
  } else {
    f(PlainBytes{});
  }
#else
  f(PlainBytes{});
#endif
}

}  // namespace forwardpass::cpu
