#pragma once
// The int8 GEMM on a CPU, by hand: what a tier's kernel is, and the weight as it reads it. All tiers give the same
// bits.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/few_rows.h"
#include "cpu/memory.h"
#include "cpu/tier.h"
#include "cpu/transpose.h"
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass::cpu {

constexpr int64_t kBlockRows = 32;

// b is packed into strips of 16 of its rows, and those into tiles of 64 of its columns: a row of a tile, 64 bytes,
// holds 4 columns of all 16 rows. N is padded to two strips, K to tiles, with zeros, so that their products are zero
// whatever a has there.
constexpr int64_t kTileRows = 16, kTileBytes = 64, kTile = kTileRows * kTileBytes, kColumnStep = 2 * kTileRows;

// Two elements that were taken out of a row of b, at columns k.
struct ExcessPair {
  uint32_t k[2];
  int16_t b[2];
};

// What was taken out of a strip: `ends` of each row's pairs.
struct StripExcess {
  std::vector<ExcessPair> pairs;
  uint32_t ends[kTileRows] = {};
};

// b, packed.
struct PackedWeight {
  int64_t columns, depth;            // N and K, padded
  int64_t used_columns, used_depth;  // the same, padded to a strip and to four: beyond them all is zero
  const uint8_t* tiles;              // [columns / 16][depth / 64][16][64]
  const int32_t* corrections;        // [columns], what the sums begin with
  const uint32_t* ends;              // [columns], of each row's pairs in `excess`
  const ExcessPair* excess;
};

// Few rows of a, prepared, rows `stride` bytes apart; zero from K on. What is added to a row's sums, modulo 2^32.
struct FewRows {
  const uint8_t* data;
  int64_t rows, stride;
  const uint32_t* corrections;
};

struct Int8Kernel {
  // Up to so many rows of a, b is read once, as it is; with more it is packed, or has been.
  int64_t few_rows, few_rows_unpacked;
  // Whether packing takes longer than the checksum by which a packed weight is known to be b still.
  bool keeps_packed;
  int64_t scratch_bytes_per_column;  // of a, what multiply_block wants

  void (*pack_strip)(const Matrix& b, int64_t strip, int64_t depth, uint8_t* tiles, int32_t* corrections,
                     StripExcess& excess);
  // sums [32, strips * 16] = a [32, depth] times the strips from `first_strip` on, an even number; of them `rows` rows
  // count. a is prepared by `prepare_block`, once for all strips.
  void (*prepare_block)(const PackedWeight& b, uint8_t* a, int64_t a_stride, uint8_t* scratch);
  void (*multiply_block)(const PackedWeight& b, const uint8_t* a, int64_t a_stride, int64_t rows,
                         const uint8_t* scratch, int64_t first_strip, int64_t strips, int32_t* sums);
  // Of few rows: `few_bytes` of an element of a, as prepare_few makes them and their corrections from a [rows, stride],
  // and sums[i * stride + j - first] = a[i] b[j] for the rows of b from `first` to `last`.
  int64_t few_bytes;
  void (*prepare_few)(const uint8_t* a, int64_t rows, int64_t stride, uint8_t* prepared, uint32_t* corrections);
  void (*multiply_few)(const FewRows& a, const Matrix& b, int64_t first, int64_t last, int32_t* sums, int64_t stride);
};

const Int8Kernel& avx2_int8();
const Int8Kernel& avx_vnni_int8();
const Int8Kernel& avx512_vnni_int8();
const Int8Kernel& amx_int8();

// The tier's kernel, null where it has none and sgemm multiplies.
const Int8Kernel* int8_kernel(Tier t);

// b, and what pack_weight made of it, of no bytes where it made nothing.
struct Int8Weight {
  Matrix b;
  const uint8_t* packed;
  int64_t packed_bytes;
};

// The first operand, int8 [rows, columns], as a function that writes `count` of its rows from `first` on, `stride`
// bytes apart: copied, quantised or gathered.
struct Int8Rows {
  int64_t rows, columns;
  std::function<void(int64_t first, int64_t count, uint8_t* to, int64_t stride)> load;
};

// a int8 [M, K] times b int8 [N, K], through the epilogue. What is packed is used where it is of this kernel and of
// these very bytes of b, which are read to know it unless it was packed without `verify`.
void int8_product(const Int8Kernel& kernel, const Int8Rows& a, const Int8Weight& weight, const Epilogue& epilogue);

// How many bytes a packed b takes is known when it is packed; then `allocate` is called, for memory aligned to 64. It
// is not where the tier has no kernel, or where to verify it takes as long as to pack b anew.
void pack_weight(Tier t, const Matrix& b, bool verify, const std::function<uint8_t*(int64_t bytes)>& allocate);

// Elements outside of b are zero.
template <class V>
INLINE void pack_tile(const Matrix& b, int64_t row, int64_t column, uint8_t* tile) {
  const int64_t rows = std::min(kTileRows, b.rows - row), bytes = std::min(kTileBytes, b.columns - column);
  const uint8_t* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
  if (bytes == kTileBytes) return transpose<V>(from, b.stride, static_cast<int>(rows), tile, kTileBytes);
  alignas(64) uint8_t padded[kTile] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(padded + r * kTileBytes, from + r * b.stride, bytes);
  transpose<V>(padded, kTileBytes, kTileRows, tile, kTileBytes);
}

// multiply_few of a tier.
template <class Dot>
INLINE void multiply_few(const FewRows& a, const Matrix& b, int64_t first, int64_t last, int32_t* sums,
                         int64_t stride) {
  const auto data = static_cast<const uint8_t*>(b.data);
  for_each_tile<Dot>(a.rows, first, last,
                     [&](auto rows, auto columns, int64_t i, int64_t j) __attribute__((always_inline)) {
                       Tile<Dot, rows, columns> tile;
                       tile.add(a.data + i * a.stride, a.stride, data + j * b.stride, b.stride, 0, b.columns);
                       tile.store(sums + i * stride + j - first, stride, a.corrections + i);
                     });
}

}  // namespace forwardpass::cpu
