// The int8 GEMM on AVX2, exactly.
//
// vpmaddubsw multiplies unsigned bytes by signed ones and adds pairs of products in 16 bits, with saturation. a + 128
// is unsigned, and 128 times the sum of b's row is subtracted in the end. Two pairs, four columns apart, are added in
// 16 bits before vpmaddwd takes their sum to 32: three instructions that multiply for 64 products in place of four.
// Four products cannot overflow where b's positive elements add up to at most 128, and its negative ones to at least
// -128: 255 * 128 = 32640. Where they are more, the largest ones are taken out of the packed matrix, and their products
// are added apart, 32 rows of a at a time, in 16 bits by vpmaddwd, at some three times the price.
//
// Measured on one core of a Zen 4, operands in L1, GMAC/s: 144; with vpmaddwd for each pair, where fewer elements would
// be taken out, 114; with both operands in 16 bits, where none are, 95; four pairs a vpmaddwd 112, as registers do not
// suffice; with |a| and the sign of a on b 67; sgemm in fp32 52. torch and OpenVINO take vpmaddubsw too, torch with
// weights of 7 bits, so that nothing saturates: other sums than ours. Packing takes 1.6 ns an element of b, so that
// without a packed weight up to some hundred rows are multiplied as they are, at 55 to 60 GMAC/s.
//
// A Zen 3's two multiplications a cycle bound the tile to 137 GMAC/s. It reaches 117 to 122 with its operands in L1,
// and 103 in MiniLM's layers. There, what was taken out is 17 % of the time of 384 columns. Two attempts are not worth
// their code. Multiplied by vpmaddubsw, in groups of six whose sums fit into 16 bits, it is 15.6 %: a third of a
// group's instructions widen its sums. With 512 columns at a time 32 rows of 1536 stay in L1; the tile was a tenth
// slower, perhaps because the stream of b breaks at each strip.
#include "cpu/int8_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace forwardpass::cpu {
namespace {

#define AVX2 __attribute__((target("arch=x86-64-v3")))

INLINE AVX2 __m256i load(const void* p) { return _mm256_load_si256(static_cast<const __m256i*>(p)); }
INLINE AVX2 void store(void* p, __m256i v) { _mm256_store_si256(static_cast<__m256i*>(p), v); }

// Byte i of each 32 bits, sign-extended.
INLINE AVX2 __m256i byte_of(__m256i v, int i) { return _mm256_srai_epi32(_mm256_slli_epi32(v, 24 - 8 * i), 24); }

using V = Vectors<8>::f32;
constexpr int kRows = 4;  // at a time

// The most that the elements of one sign of four add up to, and how many columns the two pairs of four are apart.
constexpr int kMostOfSign = 128, kPairs = 4, kEight = 8;

// Takes elements of one sign, `sign` = 1 or -1, out of the four from `eight` on, whose first is of `column`; the
// largest first.
AVX2 void take_out(int8_t* eight, int sign, int64_t column, std::vector<std::pair<uint32_t, int16_t>>& to) {
  constexpr int kPlaces[4] = {0, 1, kTileBytes, kTileBytes + 1}, kColumns[4] = {0, 1, kPairs, kPairs + 1};
  for (;;) {
    int sum = 0, largest = 0;
    for (int i = 0; i < 4; ++i) {
      sum += std::max(0, sign * eight[kPlaces[i]]);
      if (sign * eight[kPlaces[i]] > sign * eight[kPlaces[largest]]) largest = i;
    }
    if (sum <= kMostOfSign) return;
    to.emplace_back(column + kColumns[largest], eight[kPlaces[largest]]);
    eight[kPlaces[largest]] = 0;
  }
}

AVX2 void pack_strip(const Matrix& b, int64_t strip, int64_t depth, uint8_t* to, int32_t* corrections,
                     StripExcess& excess) {
  for (int64_t d = 0; d < depth; d += kTileBytes) pack_tile<V>(b, strip * kTileRows, d, to + d * kTileRows);
  const __m256i ones = _mm256_set1_epi8(1), pairs = _mm256_set1_epi16(1), most = _mm256_set1_epi16(kMostOfSign),
                zero = _mm256_setzero_si256();
  std::vector<std::pair<uint32_t, int16_t>> excess_of_rows[kTileRows];
  __m256i sums[2] = {};
  for (int64_t d = 0; d < depth; d += kEight, to += 2 * kTileBytes)
    for (int half = 0; half < 2; ++half) {
      uint8_t* first = to + half * 32;  // rows of b, four columns each, and four more
      const auto of_pairs = [&](__m256i x) AVX2 { return _mm256_maddubs_epi16(ones, x); };
      const __m256i x = load(first), y = load(first + kTileBytes);
      const __m256i positive = _mm256_add_epi16(of_pairs(_mm256_max_epi8(x, zero)), of_pairs(_mm256_max_epi8(y, zero))),
                    negative = _mm256_add_epi16(of_pairs(_mm256_min_epi8(x, zero)), of_pairs(_mm256_min_epi8(y, zero)));
      uint32_t over = _mm256_movemask_epi8(_mm256_or_si256(_mm256_cmpgt_epi16(positive, most),
                                                           _mm256_cmpgt_epi16(_mm256_sub_epi16(zero, negative), most)));
      for (over &= 0x55555555; over; over &= over - 1) {  // both bytes of a pair are set
        const int byte = __builtin_ctz(over);
        for (const int sign : {1, -1})
          take_out(reinterpret_cast<int8_t*>(first) + byte, sign, d + byte % 4, excess_of_rows[half * 8 + byte / 4]);
      }
      const __m256i four = _mm256_add_epi16(of_pairs(load(first)), of_pairs(load(first + kTileBytes)));
      sums[half] = _mm256_add_epi32(sums[half], _mm256_madd_epi16(four, pairs));
    }
  for (int half = 0; half < 2; ++half)
    store(corrections + half * 8, _mm256_sub_epi32(zero, _mm256_slli_epi32(sums[half], 7)));
  for (int i = 0; i < kTileRows; ++i) {
    if (excess_of_rows[i].size() % 2) excess_of_rows[i].emplace_back(0, 0);
    for (size_t j = 0; j < excess_of_rows[i].size(); j += 2)
      excess.pairs.push_back({{excess_of_rows[i][j].first, excess_of_rows[i][j + 1].first},
                              {excess_of_rows[i][j].second, excess_of_rows[i][j + 1].second}});
    excess.ends[i] = static_cast<uint32_t>(excess.pairs.size());
  }
}

// a as 16 bits, [depth][32].
AVX2 void transpose_rows(const uint8_t* a, int64_t a_stride, int64_t depth, uint8_t* to) {
  for (int64_t d = 0; d < depth; d += kTileBytes)
    for (int half = 0; half < 2; ++half) {
      alignas(64) uint8_t tile[kTile];  // [16 fours of columns][16 rows][4 columns]
      transpose<V>(a + half * kTileRows * a_stride + d, a_stride, kTileRows, tile, kTileBytes);
      for (int four = 0; four < 16; ++four) {
        const __m256i low = load(tile + four * 64), high = load(tile + four * 64 + 32);  // rows 0-7, 8-15
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)  // of each 128 bits the first half is of rows 0-7
          store(to + ((d + four * 4 + i) * 2 + half) * 32, _mm256_packs_epi32(byte_of(low, i), byte_of(high, i)));
      }
    }
}

// Four rows by sixteen columns.
AVX2 void multiply_rows(const uint8_t* a, int64_t a_stride, const uint8_t* b, int64_t depth, const int32_t* correction,
                        int32_t* sums, int64_t stride) {
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[kRows][2];
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) acc[i][0] = load(correction), acc[i][1] = load(correction + 8);
  for (int64_t d = 0; d < depth; d += kEight, b += 2 * kTileBytes) {
    const __m256i columns[4] = {load(b), load(b + 32), load(b + kTileBytes), load(b + kTileBytes + 32)};
#pragma GCC unroll 4
    for (int i = 0; i < kRows; ++i) {
      int32_t fours[2];
      std::memcpy(fours, a + i * a_stride + d, kEight);
      const __m256i first = _mm256_set1_epi32(fours[0]), second = _mm256_set1_epi32(fours[1]);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i four = _mm256_add_epi16(_mm256_maddubs_epi16(first, columns[half]),
                                              _mm256_maddubs_epi16(second, columns[half + 2]));
        acc[i][half] = _mm256_add_epi32(acc[i][half], _mm256_madd_epi16(four, ones));
      }
    }
  }
#pragma GCC unroll 4
  for (int i = 0; i < kRows; ++i) store(sums + i * stride, acc[i][0]), store(sums + i * stride + 8, acc[i][1]);
}

// Adds the products of what was taken out of a strip, whose rows' pairs end at `ends`.
AVX2 void add_excess(const ExcessPair* pair, const ExcessPair* pairs, const uint32_t* ends, const uint8_t* transposed,
                     int32_t* sums, int64_t stride) {
  alignas(64) int32_t products[kTileRows][kBlockRows];
  for (int n = 0; n < kTileRows; ++n) {
    __m256i acc[4] = {};
    for (const ExcessPair* end = pairs + ends[n]; pair != end; ++pair) {
      int32_t two;
      std::memcpy(&two, pair->b, 4);
      const __m256i b = _mm256_set1_epi32(two);
#pragma GCC unroll 2
      for (int half = 0; half < 2; ++half) {
        const __m256i first = load(transposed + (pair->k[0] * int64_t{2} + half) * 32),
                      second = load(transposed + (pair->k[1] * int64_t{2} + half) * 32);
        const __m256i low = _mm256_unpacklo_epi16(first, second), high = _mm256_unpackhi_epi16(first, second);
        acc[half * 2] = _mm256_add_epi32(acc[half * 2], _mm256_madd_epi16(low, b));
        acc[half * 2 + 1] = _mm256_add_epi32(acc[half * 2 + 1], _mm256_madd_epi16(high, b));
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) store(products[n] + i * 8, acc[i]);
  }
  for (int half = 0; half < 2; ++half) {
    alignas(64) int32_t by_rows[kTileRows][kTileRows];
    transpose<V>(products[0] + half * kTileRows, sizeof(products[0]), kTileRows, by_rows, sizeof(by_rows[0]));
    for (int r = 0; r < kTileRows; ++r)
      for (int i = 0; i < kTileRows; i += 8) {
        int32_t* sum = sums + (half * kTileRows + r) * stride + i;
        store(sum, _mm256_add_epi32(load(sum), load(by_rows[r] + i)));
      }
  }
}

AVX2 void prepare_block(const PackedWeight& b, uint8_t* a, int64_t a_stride, uint8_t* transposed) {
  if (b.ends[b.columns - 1]) transpose_rows(a, a_stride, b.depth, transposed);
  for (int64_t r = 0; r < kBlockRows; ++r)  // a + 128
    for (int64_t d = 0; d < b.depth; d += 32)
      store(a + r * a_stride + d, _mm256_xor_si256(load(a + r * a_stride + d), _mm256_set1_epi8(-128)));
}

AVX2 void multiply_block(const PackedWeight& b, const uint8_t* a, int64_t a_stride, int64_t rows,
                         const uint8_t* transposed, int64_t first_strip, int64_t strips, int32_t* sums) {
  const int64_t stride = strips * kTileRows;
  const int64_t used = std::min(strips, b.used_columns / kTileRows - first_strip);
  for (int64_t s = 0; s < used; ++s) {
    const int64_t column = (first_strip + s) * kTileRows;
    int32_t* to = sums + s * kTileRows;
    for (int64_t r = 0; r < rows; r += kRows)
      multiply_rows(a + r * a_stride, a_stride, b.tiles + column * b.depth, b.used_depth, b.corrections + column,
                    to + r * stride, stride);
    const uint32_t begin = column ? b.ends[column - 1] : 0;
    if (begin != b.ends[column + kTileRows - 1])
      add_excess(b.excess + begin, b.excess, b.ends + column, transposed, to, stride);
  }
}

// Few rows: both operands as 16 bits, of which sixteen products are one instruction (vpmaddwd), exact. Written as
// assembly, as an intrinsic could only be inlined into functions of its own target; and of additions on their own g++
// changed the order, for which registers did not suffice: 11 GB of weights a second for four rows, now 19.
struct Dot {
  using Sums = Vectors<8>::i32;
  using Wide = Sums;
  static constexpr int kStep = 16, kBytes = 2, kBytesOfB = 1, kSums = 8;
  INLINE static Wide widen(const uint8_t* b) {
    Wide wide;
    asm("vpmovsxbw %1, %0" : "=x"(wide) : "m"(*reinterpret_cast<const char (*)[kStep]>(b)));
    return wide;
  }
  INLINE static void add(Sums& sums, const uint8_t* a, Wide b) {
    Sums row, products;
    std::memcpy(&row, a, sizeof(row));
    asm("vpmaddwd %3, %2, %1\n\tvpaddd %1, %0, %0" : "+x"(sums), "=&x"(products) : "x"(b), "x"(row));
  }
};

AVX2 void prepare_few(const uint8_t* a, int64_t rows, int64_t stride, uint8_t* prepared, uint32_t* corrections) {
  for (int64_t i = 0; i < rows * stride; i += 16) store(prepared + i * 2, bits<__m256i>(Dot::widen(a + i)));
  std::fill(corrections, corrections + rows, 0);
}

AVX2 void multiply_few(const FewRows& a, const Matrix& b, int64_t first, int64_t last, int32_t* sums, int64_t stride) {
  cpu::multiply_few<Dot>(a, b, first, last, sums, stride);
}

}  // namespace

const Int8Kernel& avx2_int8() {
  static constexpr Int8Kernel kKernel{.few_rows = 16,
                                      .few_rows_unpacked = 256,
                                      .keeps_packed = true,
                                      .scratch_bytes_per_column = kBlockRows * 2,
                                      .pack_strip = pack_strip,
                                      .prepare_block = prepare_block,
                                      .multiply_block = multiply_block,
                                      .few_bytes = 2,
                                      .prepare_few = prepare_few,
                                      .multiply_few = multiply_few};
  return kKernel;
}

}  // namespace forwardpass::cpu
#endif
