// The int8 GEMM on AVX-512 VNNI and on AVX-VNNI: one instruction adds the products of four columns to 16 or 8 int32. It
// takes unsigned bytes of a: a + 128, and 128 times the sum of b's row is subtracted in the end.
#include "cpu/int8_kernel.h"
#include "cpu/vnni.h"

#if defined(__x86_64__)
namespace forwardpass::cpu {
namespace {

constexpr uint8_t kOnes[4] = {1, 1, 1, 1}, kShift[4] = {128, 128, 128, 128};  // v ^ kShift: each byte + 128

template <class Isa>
INLINE void pack(const Matrix& b, int64_t strip, int64_t depth, uint8_t* tiles, int32_t* corrections) {
  constexpr int kParts = kTileRows / Isa::kWidth;
  typename Isa::Ints sums[kParts] = {};
  for (int64_t d = 0; d < depth; d += kTileBytes, tiles += kTile) {
    pack_tile<typename Isa::Floats>(b, strip * kTileRows, d, tiles);
    for (int i = 0; i < kTileRows; ++i)
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j)
        Isa::add_products(sums[j], Isa::broadcast(kOnes), Isa::load(tiles + i * kTileBytes + j * sizeof(sums[j])));
  }
#pragma GCC unroll 2
  for (int j = 0; j < kParts; ++j) Isa::store(corrections + j * Isa::kWidth, sums[j] * -128);
}

// kRows rows by kStrips strips, of which b's depth is that of memory. `stride`: of the sums.
template <class Isa, int kRows, int kStrips>
INLINE void multiply_rows(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t depth, int64_t used_depth,
                          const int32_t* corrections, int32_t* sums, int64_t stride) {
  constexpr int kParts = kStrips * kTileRows / Isa::kWidth, kPartsOfStrip = kParts / kStrips;
  typename Isa::Ints acc[kRows][kParts];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) acc[i][j] = Isa::load(corrections + j * Isa::kWidth);
  for (int64_t d = 0; d < used_depth; d += 4, b += kTileBytes) {
    typename Isa::Ints columns[kParts];
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j)
      columns[j] =
          Isa::load(b + j / kPartsOfStrip * depth * kTileRows + j % kPartsOfStrip * sizeof(typename Isa::Ints));
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const typename Isa::Ints row = Isa::broadcast(a + i * a_stride + d);
#pragma GCC unroll 2
      for (int j = 0; j < kParts; ++j) Isa::add_products(acc[i][j], row, columns[j]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) Isa::store(sums + i * stride + j * Isa::kWidth, acc[i][j]);
}

template <class Isa, int kRows, int kStrips>
INLINE void multiply(const PackedWeight& b, const uint8_t* a, int64_t a_stride, int64_t rows, int64_t first_strip,
                     int64_t strips, int32_t* sums) {
  for (int64_t s = 0; s < strips; s += kStrips)
    for (int64_t r = 0; r < rows; r += kRows)
      multiply_rows<Isa, kRows, kStrips>(a + r * a_stride, a_stride, b.tiles + (first_strip + s) * b.depth * kTileRows,
                                         b.depth, b.used_depth, b.corrections + (first_strip + s) * kTileRows,
                                         sums + (r * strips + s) * kTileRows, strips * kTileRows);
}

// a + 128, of a multiple of 64 bytes.
template <class Isa>
INLINE void shift(uint8_t* a, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += sizeof(typename Isa::Ints))
    Isa::store(a + i, Isa::load(a + i) ^ Isa::broadcast(kShift));
}

// Few rows: b + 128 is the unsigned one, as b's sums are not known, and a row's is soon found.
template <class Isa, int kSumsOfTier>
struct VnniDot {
  using Sums = typename Isa::Ints;
  using Wide = Sums;
  static constexpr int kStep = sizeof(Sums), kBytes = 1, kBytesOfB = 1, kSums = kSumsOfTier;
  INLINE static Wide widen(const uint8_t* b) { return Isa::load(b) ^ Isa::broadcast(kShift); }
  INLINE static void add(Sums& sums, const uint8_t* a, Wide b) { Isa::add_products(sums, b, Isa::load(a)); }
};

template <class Isa>
INLINE void prepare_few(const uint8_t* a, int64_t rows, int64_t stride, uint8_t* prepared, uint32_t* corrections) {
  std::memcpy(prepared, a, rows * stride);
  for (int64_t r = 0; r < rows; ++r) {
    typename Isa::Ints row_sum = {};
    for (int64_t i = 0; i < stride; i += sizeof(row_sum))
      Isa::add_products(row_sum, Isa::broadcast(kOnes), Isa::load(a + r * stride + i));
    corrections[r] = -128 * sum(row_sum);
  }
}

// A kernel's functions, compiled for TARGET. Of g++'s targets a template has none.
#define VNNI_FUNCTIONS(TARGET, ISA, ROWS, STRIPS, FEW_SUMS)                                                          \
  TARGET static void pack_strip(const Matrix& b, int64_t strip, int64_t depth, uint8_t* tiles, int32_t* corrections, \
                                StripExcess&) {                                                                      \
    pack<ISA>(b, strip, depth, tiles, corrections);                                                                  \
  }                                                                                                                  \
  TARGET static void prepare_block(const PackedWeight& b, uint8_t* a, int64_t a_stride, uint8_t*) {                  \
    for (int64_t r = 0; r < kBlockRows; ++r) shift<ISA>(a + r * a_stride, b.depth);                                  \
  }                                                                                                                  \
  TARGET static void multiply_block(const PackedWeight& b, const uint8_t* a, int64_t a_stride, int64_t rows,         \
                                    const uint8_t*, int64_t first_strip, int64_t strips, int32_t* sums) {            \
    multiply<ISA, ROWS, STRIPS>(b, a, a_stride, rows, first_strip, strips, sums);                                    \
  }                                                                                                                  \
  TARGET static void prepare_few(const uint8_t* a, int64_t rows, int64_t stride, uint8_t* prepared,                  \
                                 uint32_t* corrections) {                                                            \
    cpu::prepare_few<ISA>(a, rows, stride, prepared, corrections);                                                   \
  }                                                                                                                  \
  TARGET static void multiply_few(const FewRows& a, const Matrix& b, int64_t first, int64_t last, int32_t* sums,     \
                                  int64_t stride) {                                                                  \
    cpu::multiply_few<VnniDot<ISA, FEW_SUMS>>(a, b, first, last, sums, stride);                                      \
  }

// Sixteen accumulators of the 32 registers.
struct Avx512Vnni {
  VNNI_FUNCTIONS(__attribute__((target("arch=x86-64-v4"))), Vnni<16>, 8, 2, 16)
};
// Eight of 16, two for b and one for a.
template <bool kVex>
struct AvxVnni {
  using Isa = Vnni<8, kVex>;
  VNNI_FUNCTIONS(__attribute__((target("arch=x86-64-v3"))), Isa, 4, 1, 8)
};

// Packing b on each call takes no longer than the checksum of a packed one, and more than the products of few rows: one
// core of a Zen 4 multiplies 16 rows by 1536 x 576 in 0.13 ms, 24 in 0.18, and by way of packing in 0.24 and 0.28. With
// b in its caches 24 rows take the same time either way. Of int8_linear without a packed weight, one core of an EPYC
// 9005, 32, 48, 64 and 96 rows take .64, .80, .87 and .94 of the time by way of packing at 1536 x 576, .72, .80, .87
// and .97 at 4096 x 1024; 384 x 384 alone takes longer from 32 rows on (1.03, 1.11, 1.16, 1.23).
template <class Functions>
constexpr Int8Kernel kernel{.few_rows = 24,
                            .few_rows_unpacked = 64,
                            .keeps_packed = false,
                            .scratch_bytes_per_column = 0,
                            .pack_strip = Functions::pack_strip,
                            .prepare_block = Functions::prepare_block,
                            .multiply_block = Functions::multiply_block,
                            .few_bytes = 1,
                            .prepare_few = Functions::prepare_few,
                            .multiply_few = Functions::multiply_few};

}  // namespace

const Int8Kernel& avx512_vnni_int8() { return kernel<Avx512Vnni>; }
const Int8Kernel& avx_vnni_int8() { return has_avx_vnni() ? kernel<AvxVnni<true>> : kernel<AvxVnni<false>>; }

}  // namespace forwardpass::cpu
#endif
