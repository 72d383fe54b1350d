#pragma once
// The int8 GEMM on a CPU, by hand: one design for every instruction set that has a tier.
//
// The multiplications cost less time than the memory traffic around them: of 1024 x 384 times 384 x 384 they are 75 us
// of one core with AMX, but the 1.6 MB of int32 sums are written by one pass and read by the next. So a block of 32
// rows at a time goes through all three steps in a core's own caches: quantisation, product with all of b, epilogue.
#include <algorithm>
#include <cstring>
#include <memory>

#include "cpu/row_chunks.h"
#include "cpu/transpose.h"
#include "torch/check.h"

namespace forwardpass::cpu {

constexpr int64_t kBlockRows = 32;

// b is packed into strips of 16 of its rows, and those into tiles of 64 of its columns: a row of a tile, 64 bytes,
// holds 4 columns of all 16 rows.
constexpr int64_t kTileRows = 16, kTileBytes = 64, kTile = kTileRows * kTileBytes;

// Aligned to cache lines, as tiles are loaded and stored.
struct alignas(64) CacheLine {
  uint8_t bytes[64];
};
using CacheLines = std::unique_ptr<CacheLine[]>;
inline CacheLines allocate(int64_t bytes) { return CacheLines(new CacheLine[(bytes + 63) / 64]); }

// Elements outside of b are zero, so that their products are zero whatever a has there.
INLINE void pack_tile(const Matrix& b, int64_t row, int64_t column, uint8_t* tile) {
  const int64_t rows = std::min(kTileRows, b.rows - row), bytes = std::min(kTileBytes, b.columns - column);
  const uint8_t* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
  if (bytes == kTileBytes) return transpose(from, b.stride, static_cast<int>(rows), tile, kTileBytes);
  alignas(64) uint8_t padded[kTile] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(padded + r * kTileBytes, from + r * b.stride, bytes);
  transpose(padded, kTileBytes, kTileRows, tile, kTileBytes);
}

// Rows of a from `first` on, int8, to `to`: copied or, with `quantize`, made of x.
inline void load_rows(const Matrix& a, const QuantizeParams* quantize, int64_t first, int64_t count, uint8_t* to,
                      int64_t stride) {
  if (quantize) {
    QuantizeParams q = rows_from(*quantize, first, count);
    q.out.q = to, q.out.q_stride = stride;
    return quantize_cpu(q);
  }
  auto from = static_cast<const uint8_t*>(a.data) + first * a.stride;
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * a.stride, a.columns);
}

// a int8 [M, K] or, with `quantize`, its x, times b int8 [N, K], through the epilogue. With `quantize`, a.data is not
// read and quantize->out.q is not written. A Tier is b, packed:
//   kColumns                                   of accumulators at a time, a multiple of 16; b is padded to it
//   Tier(columns, depth)                       allocates; columns and depth are N and K, padded
//   pack(b, strip)                             packs a strip; several threads do
//   Scope                                      what a thread that multiplies needs
//   multiply(scope, a, a_stride, rows, sums)   sums [32, columns] = a [32, depth] b, of which `rows` rows count; a is
//                                              scratch
template <class Tier>
void int8_blocks(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize) {
  const int64_t m = a.rows, k = a.columns, n = b.rows;
  const int64_t depth = round_up(k, kTileBytes), columns = round_up(n, Tier::kColumns);
  Tier packed(columns, depth);
  torch::stable::parallel_for(0, round_up(n, kTileRows) / kTileRows, 4, [&](int64_t first, int64_t last) {
    for (int64_t strip = first; strip < last; ++strip) packed.pack(b, strip);
  });
  const int64_t a_stride = depth + kTileBytes;  // no power of two, as 16 rows would then share a set of L1
  torch::stable::parallel_for(0, round_up(m, kBlockRows) / kBlockRows, 1, [&](int64_t first, int64_t last) {
    const CacheLines rows = allocate(kBlockRows * a_stride), sums = allocate(kBlockRows * columns * 4);
    auto a_rows = rows[0].bytes;
    auto acc = reinterpret_cast<int32_t*>(sums[0].bytes);
    typename Tier::Scope scope(packed);
    for (int64_t r = first * kBlockRows; r < std::min(m, last * kBlockRows); r += kBlockRows) {
      const int64_t count = std::min(kBlockRows, m - r);
      load_rows(a, quantize, r, count, a_rows, a_stride);
      packed.multiply(scope, a_rows, a_stride, count, acc);
      dequant_activation_cpu({{acc, Dtype::i32, count, n, columns}, rows_from(epilogue, r)});
    }
  });
}

// The same of few rows, for which b is not packed but read once, as it is. Rows is a, prepared:
//   Rows(a, rows, depth)        a is int8 [rows, depth], with anything beyond K
//   dots<kRows, kColumns>(first_row, b, b_stride, k, sums, stride)
//                               sums[i * stride + j] = a[first_row + i] b[j], of kRows rows of a and kColumns of b
template <class Rows, int kRows>
void multiply_few_rows(const Rows& a, int64_t first_row, const Matrix& b, int64_t first, int64_t last, int32_t* sums,
                       int64_t stride) {
  const auto row = [&](int64_t j) { return static_cast<const uint8_t*>(b.data) + j * b.stride; };
  int32_t* to = sums + first_row * stride;
  int64_t j = first;
  for (; j + 2 <= last; j += 2) a.template dots<kRows, 2>(first_row, row(j), b.stride, b.columns, to + j, stride);
  if (j < last) a.template dots<kRows, 1>(first_row, row(j), b.stride, b.columns, to + j, stride);
}

template <class Rows>
void int8_few_rows(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize) {
  const int64_t m = a.rows, k = a.columns, n = b.rows, depth = round_up(k, kTileBytes), columns = round_up(n, 16);
  const CacheLines quantized = allocate(m * depth), memory = allocate(m * columns * 4);
  load_rows(a, quantize, 0, m, quantized[0].bytes, depth);
  const Rows rows(quantized[0].bytes, m, depth);
  auto sums = reinterpret_cast<int32_t*>(memory[0].bytes);
  // As many rows of b for a thread as take about 5 us; a few at a time, so that they stay in L1 for all of a.
  torch::stable::parallel_for(0, n, std::max<int64_t>(1, 262144 / (k * m)), [&](int64_t begin, int64_t end) {
    constexpr int64_t kTogether = 16;
    for (int64_t first = begin; first < end; first += kTogether) {
      const int64_t last = std::min(end, first + kTogether);
      int64_t r = 0;
      for (; r + 4 <= m; r += 4) multiply_few_rows<Rows, 4>(rows, r, b, first, last, sums, columns);
      if (m - r >= 2) multiply_few_rows<Rows, 2>(rows, r, b, first, last, sums, columns), r += 2;
      if (r < m) multiply_few_rows<Rows, 1>(rows, r, b, first, last, sums, columns);
    }
  });
  dequant_activation_cpu({{sums, Dtype::i32, m, n, columns}, epilogue});
}

// Up to Tier::kFewRows rows of a without packing b, more with.
template <class Tier, class Rows>
void int8_product(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize) {
  return a.rows <= Tier::kFewRows ? int8_few_rows<Rows>(a, b, epilogue, quantize)
                                  : int8_blocks<Tier>(a, b, epilogue, quantize);
}

}  // namespace forwardpass::cpu
