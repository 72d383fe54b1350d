// The int8 GEMM on AMX tiles. A tile is 16 rows of 64 bytes; one instruction adds the products of 64 columns to 16 x 16
// int32, in 16 cycles.
//
// The products cost a CPU less time than what surrounds them: 1024 x 384 times 384 x 384 takes 75 us of a core's tiles,
// and 0.6 MB of int32 that one pass writes and the next one reads. So 32 rows at a time go through all three steps in a
// core's own caches: quantisation, product with all of b, epilogue.
#include "cpu/int8_amx.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include <algorithm>
#include <memory>

#include "cpu/capability.h"
#include "cpu/row_chunks.h"
#include "cpu/transpose.h"
#include "torch/check.h"

namespace forwardpass {

#if defined(__x86_64__)
namespace cpu {
namespace {

constexpr int64_t kTileRows = 16, kTileBytes = 64, kTile = kTileRows * kTileBytes;
constexpr int64_t kRows = 2 * kTileRows, kColumns = 2 * kTileRows;  // of accumulators, in four tiles

int64_t up_to(int64_t n, int64_t unit) { return (n + unit - 1) / unit * unit; }

// Memory aligned to cache lines, from which tiles are loaded.
struct alignas(64) Lines {
  uint8_t bytes[64];
};
using Memory = std::unique_ptr<Lines[]>;
Memory lines(int64_t bytes) { return Memory(new Lines[(bytes + 63) / 64]); }

// Packs 16 rows by 64 columns of b into a tile, each of whose rows holds 4 columns of all 16. What is outside b is
// zero, and so are its products with any values of a.
__attribute__((target("arch=x86-64-v4"))) void pack_tile(const Matrix& b, int64_t row, int64_t column, uint8_t* tile) {
  const int64_t rows = std::min(kTileRows, b.rows - row), bytes = std::min(kTileBytes, b.columns - column);
  const uint8_t* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
  if (bytes == kTileBytes) return transpose(from, b.stride, static_cast<int>(rows), tile, kTileBytes);
  alignas(64) uint8_t part[kTile] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(part + r * kTileBytes, from + r * b.stride, bytes);
  transpose(part, kTileBytes, kTileRows, tile, kTileBytes);
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// sums [32, columns] = a [32, depth] b; b is packed: the tiles of 16 of its columns are contiguous.
__attribute__((target("amx-tile,amx-int8"))) void multiply(const uint8_t* a, int64_t a_stride, const uint8_t* b,
                                                           int64_t depth, int32_t* sums, int64_t columns) {
  const int64_t strip = depth / kTileBytes * kTile, sums_stride = columns * 4;
  for (int64_t c = 0; c < columns; c += kColumns) {
    const uint8_t *b0 = b + c / kTileRows * strip, *b1 = b0 + strip;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < depth; d += kTileBytes) {
      _tile_loadd(4, a + d, a_stride);
      _tile_loadd(6, b0 + d * kTileRows, kTileBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, b1 + d * kTileRows, kTileBytes);
      _tile_dpbssd(1, 4, 7);
      _tile_loadd(5, a + kTileRows * a_stride + d, a_stride);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    int32_t* to = sums + c;
    _tile_stored(0, to, sums_stride);
    _tile_stored(1, to + kTileRows, sums_stride);
    _tile_stored(2, to + kTileRows * columns, sums_stride);
    _tile_stored(3, to + kTileRows * columns + kTileRows, sums_stride);
  }
}

__attribute__((target("amx-tile"))) void configure() {
  const TileConfig config;
  _tile_loadconfig(&config);
}
__attribute__((target("amx-tile"))) void release() { _tile_release(); }

bool allowed() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for the whole process
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace
}  // namespace cpu
#endif

bool has_amx_int8() {
#if defined(__x86_64__)
  static const bool has = __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("x86-64-v4") &&
                          cpu::avx512_is_left() && cpu::allowed();
  return has;
#else
  return false;
#endif
}

void int8_amx(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize) {
#if defined(__x86_64__)
  using namespace cpu;
  const int64_t m = a.rows, k = a.columns, n = b.rows;
  const int64_t depth = up_to(k, kTileBytes), columns = up_to(n, kColumns), tiles = depth / kTileBytes;
  const Memory packed = lines(columns * depth);
  auto b_tiles = packed[0].bytes;
  torch::stable::parallel_for(0, up_to(n, kTileRows) / kTileRows, 4, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = 0; t < tiles; ++t)
        pack_tile(b, j * kTileRows, t * kTileBytes, b_tiles + (j * tiles + t) * kTile);
  });
  const int64_t a_stride = depth + kTileBytes;  // not a power of two, with which 16 rows would share a set of L1
  torch::stable::parallel_for(0, up_to(m, kRows) / kRows, 1, [&](int64_t first, int64_t last) {
    const Memory rows = lines(kRows * a_stride), sums = lines(kRows * columns * 4);
    auto a_rows = rows[0].bytes;
    auto acc = reinterpret_cast<int32_t*>(sums[0].bytes);
    configure();
    for (int64_t r = first * kRows; r < std::min(m, last * kRows); r += kRows) {
      const int64_t count = std::min(kRows, m - r);
      if (quantize) {
        QuantizeParams q = rows_from(*quantize, r, count);
        q.out.q = a_rows, q.out.q_stride = a_stride;
        quantize_cpu(q);
      } else {
        auto from = static_cast<const uint8_t*>(a.data) + r * a.stride;
        for (int64_t i = 0; i < count; ++i) std::memcpy(a_rows + i * a_stride, from + i * a.stride, k);
      }
      multiply(a_rows, a_stride, b_tiles, depth, acc, columns);
      dequant_activation_cpu({{acc, Dtype::i32, count, n, columns}, rows_from(epilogue, r)});
    }
    release();
  });
#endif
}

}  // namespace forwardpass
