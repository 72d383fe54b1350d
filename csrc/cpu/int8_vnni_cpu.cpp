// The int8 GEMM on AVX-512 VNNI: one instruction adds the products of four columns to 16 int32. It takes unsigned bytes
// of a: a + 128, and 128 times the sum of b's row is subtracted in the end.
//
// Time on one core of a Zen 4, as a fraction of that of oneDNN's product between passes that quantise and dequantise:
// 0.85 for 1024 rows times 384 x 384 and x 1536, 0.97 for 1536 x 384, 0.63 for 32 rows, 0.5 for eight.
#include "cpu/int8_tiers.h"

#if defined(__x86_64__)
#include <immintrin.h>

#include "cpu/int8_blocks.h"
#endif
#include "cpu/capability.h"

namespace forwardpass {

#if defined(__x86_64__)
namespace cpu {
namespace {

#define VNNI __attribute__((target("arch=x86-64-v4,avx512vnni")))

struct VnniTier {
  static constexpr int64_t kColumns = 2 * kTileRows, kRows = 8, kFewRows = 6;
  const int64_t columns, depth;
  const CacheLines tiles, corrections;  // corrections: int32 [columns], what the sums begin with

  struct Scope {
    explicit Scope(const VnniTier&) {}
  };

  VnniTier(int64_t columns, int64_t depth)
      : columns(columns), depth(depth), tiles(allocate(columns * depth)), corrections(allocate(columns * 4)) {}

  VNNI void pack(const Matrix& b, int64_t strip) {
    uint8_t* to = tiles[0].bytes + strip * depth * kTileRows;
    __m512i sums = _mm512_setzero_si512();
    for (int64_t d = 0; d < depth; d += kTileBytes, to += kTile) {
      pack_tile(b, strip * kTileRows, d, to);
      for (int i = 0; i < kTileRows; ++i)
        sums = _mm512_dpbusd_epi32(sums, _mm512_set1_epi8(1), _mm512_load_si512(to + i * kTileBytes));
    }
    _mm512_store_si512(corrections[0].bytes + strip * kTileBytes,
                       _mm512_sub_epi32(_mm512_setzero_si512(), _mm512_slli_epi32(sums, 7)));
  }

  // Eight rows by two strips.
  VNNI static void multiply_rows(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t depth,
                                 const uint8_t* correction, int32_t* sums, int64_t stride) {
    const uint8_t* second = b + depth * kTileRows;
    __m512i acc[kRows][2];
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      acc[i][0] = _mm512_load_si512(correction);
      acc[i][1] = _mm512_load_si512(correction + kTileBytes);
    }
    for (int64_t d = 0; d < depth; d += 4, b += kTileBytes, second += kTileBytes) {
      const __m512i b0 = _mm512_load_si512(b), b1 = _mm512_load_si512(second);
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        int32_t four;
        std::memcpy(&four, a + i * a_stride + d, 4);
        const __m512i row = _mm512_set1_epi32(four);
        acc[i][0] = _mm512_dpbusd_epi32(acc[i][0], row, b0);
        acc[i][1] = _mm512_dpbusd_epi32(acc[i][1], row, b1);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      _mm512_store_si512(sums + i * stride, acc[i][0]);
      _mm512_store_si512(sums + i * stride + kTileRows, acc[i][1]);
    }
  }

  VNNI void multiply(Scope&, uint8_t* a, int64_t a_stride, int64_t rows, int32_t* sums) const {
    for (int64_t r = 0; r < rows; ++r)  // a + 128
      for (int64_t d = 0; d < depth; d += kTileBytes) {
        uint8_t* p = a + r * a_stride + d;
        _mm512_store_si512(p, _mm512_xor_si512(_mm512_load_si512(p), _mm512_set1_epi8(-128)));
      }
    for (int64_t c = 0; c < columns; c += kColumns)
      for (int64_t r = 0; r < rows; r += kRows)
        multiply_rows(a + r * a_stride, a_stride, tiles[0].bytes + c * depth, depth, corrections[0].bytes + c * 4,
                      sums + r * columns + c, columns);
  }
};

// Few rows: the memory of b binds.
struct VnniRows {
  const int64_t depth;
  const CacheLines shifted;  // a + 128, [rows][depth]

  VNNI VnniRows(const uint8_t* a, int64_t rows, int64_t depth) : depth(depth), shifted(allocate(rows * depth)) {
    for (int64_t i = 0; i < rows * depth; i += kTileBytes)
      _mm512_store_si512(shifted[0].bytes + i, _mm512_xor_si512(_mm512_load_si512(a + i), _mm512_set1_epi8(-128)));
  }
  template <int kRows, int kColumns>
  VNNI void dots(int64_t first_row, const uint8_t* b, int64_t b_stride, int64_t k, int32_t* sums,
                 int64_t stride) const {
    const uint8_t* a = shifted[0].bytes + first_row * depth;
    __m512i acc[kRows][kColumns] = {}, b_sum[kColumns] = {};
    for (int64_t d = 0; d < k; d += kTileBytes) {
      const __mmask64 inside = k - d < kTileBytes ? (uint64_t{1} << (k - d)) - 1 : ~uint64_t{0};
#pragma GCC unroll 2
      for (int j = 0; j < kColumns; ++j) {
        const __m512i column = _mm512_maskz_loadu_epi8(inside, b + j * b_stride + d);
        b_sum[j] = _mm512_dpbusd_epi32(b_sum[j], _mm512_set1_epi8(1), column);
#pragma GCC unroll 4
        for (int i = 0; i < kRows; ++i)
          acc[i][j] = _mm512_dpbusd_epi32(acc[i][j], _mm512_load_si512(a + i * depth + d), column);
      }
    }
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      const __m512i correction = _mm512_slli_epi32(b_sum[j], 7);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i)
        sums[i * stride + j] = _mm512_reduce_add_epi32(_mm512_sub_epi32(acc[i][j], correction));
    }
  }
};

}  // namespace
}  // namespace cpu
#endif

bool has_vnni() {
#if defined(__x86_64__)
  static const bool available =
      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("x86-64-v4") && cpu::avx512_is_allowed();
  return available;
#else
  return false;
#endif
}

void int8_vnni([[maybe_unused]] const Matrix& a, [[maybe_unused]] const Matrix& b,
               [[maybe_unused]] const Epilogue& epilogue, [[maybe_unused]] const QuantizeParams* quantize) {
#if defined(__x86_64__)
  cpu::int8_product<cpu::VnniTier, cpu::VnniRows>(a, b, epilogue, quantize);
#endif
}

}  // namespace forwardpass
