// The int8 GEMM on AMX tiles. A tile is 16 rows of 64 bytes; one instruction adds the products of 64 columns to 16 x 16
// int32, in 16 cycles.
//
// The multiplications cost less time than the memory traffic around them: of 1024 x 384 times 384 x 384 they are 75 us
// of one core, but the 1.6 MB of int32 sums are written by one pass and read by the next. So 32 rows at a time go
// through all three steps in a core's own caches: quantisation, product with all of b, epilogue.
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

// Memory that tiles are loaded from and stored to is aligned to cache lines.
struct alignas(64) CacheLine {
  uint8_t bytes[64];
};
using CacheLines = std::unique_ptr<CacheLine[]>;
CacheLines allocate(int64_t bytes) { return CacheLines(new CacheLine[(bytes + 63) / 64]); }

// Packs 16 rows by 64 columns of b into a tile. A row of the tile holds 4 columns of all 16 rows. Elements outside of b
// are zero, so that their products are zero whatever a has there.
__attribute__((target("arch=x86-64-v4"))) void pack_tile(const Matrix& b, int64_t row, int64_t column, uint8_t* tile) {
  const int64_t rows = std::min(kTileRows, b.rows - row), bytes = std::min(kTileBytes, b.columns - column);
  const uint8_t* from = static_cast<const uint8_t*>(b.data) + row * b.stride + column;
  if (bytes == kTileBytes) return transpose(from, b.stride, static_cast<int>(rows), tile, kTileBytes);
  alignas(64) uint8_t padded[kTile] = {};
  for (int64_t r = 0; r < rows; ++r) std::memcpy(padded + r * kTileBytes, from + r * b.stride, bytes);
  transpose(padded, kTileBytes, kTileRows, tile, kTileBytes);
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

// Asks the kernel for the tile registers, which a process must do once before it uses them.
bool request_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

}  // namespace
}  // namespace cpu
#endif

bool has_amx_int8() {
#if defined(__x86_64__)
  static const bool available = __builtin_cpu_supports("amx-int8") && __builtin_cpu_supports("x86-64-v4") &&
                                cpu::avx512_is_allowed() && cpu::request_tiles();
  return available;
#else
  return false;
#endif
}

void int8_amx(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize) {
#if defined(__x86_64__)
  using namespace cpu;
  const int64_t m = a.rows, k = a.columns, n = b.rows;
  const int64_t depth = round_up(k, kTileBytes), columns = round_up(n, kColumns), tiles = depth / kTileBytes;
  const CacheLines packed_b = allocate(columns * depth);
  auto b_tiles = packed_b[0].bytes;
  torch::stable::parallel_for(0, round_up(n, kTileRows) / kTileRows, 4, [&](int64_t first, int64_t last) {
    for (int64_t j = first; j < last; ++j)
      for (int64_t t = 0; t < tiles; ++t)
        pack_tile(b, j * kTileRows, t * kTileBytes, b_tiles + (j * tiles + t) * kTile);
  });
  const int64_t a_stride = depth + kTileBytes;  // no power of two, as 16 rows would then share a set of L1
  torch::stable::parallel_for(0, round_up(m, kRows) / kRows, 1, [&](int64_t first, int64_t last) {
    const CacheLines rows = allocate(kRows * a_stride), sums = allocate(kRows * columns * 4);
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
