// The int8 GEMM on AVX-512 VNNI and on AVX-VNNI: one instruction adds the products of four columns to 16 or 8 int32. It
// takes unsigned bytes of a: a + 128, and 128 times the sum of b's row is subtracted in the end.
#include "cpu/int8_kernel.h"
#include "cpu/vector.h"

#if defined(__x86_64__)
namespace forwardpass::cpu {
namespace {

// kVex: as AVX-VNNI encodes the instruction, with 256 bits; AVX-512 encodes it anew. Written as assembly, as an
// intrinsic could only be inlined into functions of its own target, and these are templates over both.
template <int kLanes, bool kVex = false>
struct Vnni {
  static constexpr int kWidth = kLanes;
  using Ints = typename Vectors<kLanes>::i32;
  using Floats = typename Vectors<kLanes>::f32;

  INLINE static Ints load(const void* p) {
    Ints v;
    std::memcpy(&v, p, sizeof(v));
    return v;
  }
  INLINE static void store(void* p, Ints v) { std::memcpy(p, &v, sizeof(v)); }
  // Four bytes to all lanes. Of g++'s ways to write it, in a function without the target, each is made lane by lane.
  INLINE static Ints broadcast(const void* p) {
    Ints v;
    asm("vpbroadcastd %1, %0" : "=v"(v) : "m"(*static_cast<const char (*)[4]>(p)));
    return v;
  }
  INLINE static void add_products(Ints& sums, Ints unsigned_bytes, Ints signed_bytes) {
    if constexpr (kVex) {
      asm("%{vex%} vpdpbusd %2, %1, %0" : "+x"(sums) : "x"(unsigned_bytes), "x"(signed_bytes));
    } else {
      asm("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(unsigned_bytes), "v"(signed_bytes));
    }
  }
};

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

// kRows rows by kStrips strips. `stride`: of the sums.
template <class Isa, int kRows, int kStrips>
INLINE void multiply_rows(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t depth,
                          const int32_t* corrections, int32_t* sums, int64_t stride) {
  constexpr int kParts = kStrips * kTileRows / Isa::kWidth, kPartsOfStrip = kParts / kStrips;
  typename Isa::Ints acc[kRows][kParts];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i)
#pragma GCC unroll 2
    for (int j = 0; j < kParts; ++j) acc[i][j] = Isa::load(corrections + j * Isa::kWidth);
  for (int64_t d = 0; d < depth; d += 4, b += kTileBytes) {
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
                                         b.depth, b.corrections + (first_strip + s) * kTileRows,
                                         sums + (r * strips + s) * kTileRows, strips * kTileRows);
}

// a + 128, of a multiple of 64 bytes.
template <class Isa>
INLINE void shift(const uint8_t* from, int64_t bytes, uint8_t* to) {
  for (int64_t i = 0; i < bytes; i += sizeof(typename Isa::Ints))
    Isa::store(to + i, Isa::load(from + i) ^ Isa::broadcast(kShift));
}

// Few rows: the memory of b binds.
template <class Isa, int kRows, int kColumns>
INLINE void dot_products(const uint8_t* a, int64_t depth, const uint8_t* b, int64_t b_stride, int64_t k, int32_t* sums,
                         int64_t stride) {
  using Ints = typename Isa::Ints;
  constexpr int64_t kStep = sizeof(Ints);
  Ints acc[kRows][kColumns] = {}, b_sum[kColumns] = {};
  const auto add = [&](int64_t d, const uint8_t* columns, int64_t column_stride) __attribute__((always_inline)) {
#pragma GCC unroll 2
    for (int j = 0; j < kColumns; ++j) {
      const Ints column = Isa::load(columns + j * column_stride);
      Isa::add_products(b_sum[j], Isa::broadcast(kOnes), column);
#pragma GCC unroll 4
      for (int i = 0; i < kRows; ++i) Isa::add_products(acc[i][j], Isa::load(a + i * depth + d), column);
    }
  };
  int64_t d = 0;
  for (; d + kStep <= k; d += kStep) add(d, b + d, b_stride);
  if (d < k) {
    uint8_t rest[kColumns][kStep] = {};
    for (int j = 0; j < kColumns; ++j) std::memcpy(rest[j], b + j * b_stride + d, k - d);
    add(d, rest[0], kStep);
  }
#pragma GCC unroll 2
  for (int j = 0; j < kColumns; ++j)
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) sums[i * stride + j] = sum(acc[i][j] - b_sum[j] * 128);
}

// A kernel's functions, compiled for TARGET. Of g++'s targets a template has none.
#define VNNI_FUNCTIONS(TARGET, ISA, ROWS, STRIPS)                                                                    \
  struct Rows {                                                                                                      \
    static constexpr int kBytes = 1;                                                                                 \
    template <int kRows, int kColumns>                                                                               \
    TARGET static void dots(const uint8_t* a, int64_t depth, const uint8_t* b, int64_t b_stride, int64_t k,          \
                            int32_t* sums, int64_t stride) {                                                         \
      dot_products<ISA, kRows, kColumns>(a, depth, b, b_stride, k, sums, stride);                                    \
    }                                                                                                                \
  };                                                                                                                 \
  TARGET static void pack_strip(const Matrix& b, int64_t strip, int64_t depth, uint8_t* tiles, int32_t* corrections, \
                                StripExcess&) {                                                                      \
    pack<ISA>(b, strip, depth, tiles, corrections);                                                                  \
  }                                                                                                                  \
  TARGET static void prepare_block(const PackedWeight& b, uint8_t* a, int64_t a_stride, uint8_t*) {                  \
    for (int64_t r = 0; r < kBlockRows; ++r) shift<ISA>(a + r * a_stride, b.depth, a + r * a_stride);                \
  }                                                                                                                  \
  TARGET static void multiply_block(const PackedWeight& b, const uint8_t* a, int64_t a_stride, int64_t rows,         \
                                    const uint8_t*, int64_t first_strip, int64_t strips, int32_t* sums) {            \
    multiply<ISA, ROWS, STRIPS>(b, a, a_stride, rows, first_strip, strips, sums);                                    \
  }                                                                                                                  \
  TARGET static void prepare_few(const uint8_t* a, int64_t elements, uint8_t* prepared) {                            \
    shift<ISA>(a, elements, prepared);                                                                               \
  }

// Sixteen accumulators of the 32 registers.
struct Avx512Vnni {
  VNNI_FUNCTIONS(__attribute__((target("arch=x86-64-v4"))), Vnni<16>, 8, 2)
};
// Eight of 16, two for b and one for a.
template <bool kVex>
struct AvxVnni {
  using Isa = Vnni<8, kVex>;
  VNNI_FUNCTIONS(__attribute__((target("arch=x86-64-v3"))), Isa, 4, 1)
};

// Packing b on each call takes no longer than the checksum of a packed one: seven rows times 384 x 1536 take 0.056 ms
// with the one, 0.076 with the other. Up to twelve rows are faster without.
template <class Functions>
constexpr Int8Kernel kernel{.few_rows = 12,
                            .few_rows_unpacked = 12,
                            .keeps_packed = false,
                            .scratch_bytes_per_column = 0,
                            .pack_strip = Functions::pack_strip,
                            .prepare_block = Functions::prepare_block,
                            .multiply_block = Functions::multiply_block,
                            .prepare_few = Functions::prepare_few,
                            .multiply_few = multiply_few<typename Functions::Rows>};

}  // namespace

const Int8Kernel& avx512_vnni_int8() { return kernel<Avx512Vnni>; }
const Int8Kernel& avx_vnni_int8() { return has_avx_vnni() ? kernel<AvxVnni<true>> : kernel<AvxVnni<false>>; }

}  // namespace forwardpass::cpu
#endif
