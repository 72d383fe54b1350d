// The int8 GEMM on AMX tiles. A tile is 16 rows of 64 bytes; one instruction adds the products of 64 columns to 16 x 16
// int32, in 16 cycles.
#include "cpu/int8_kernel.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace forwardpass::cpu {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

__attribute__((target("arch=x86-64-v4"))) void pack_strip(const Matrix& b, int64_t strip, int64_t depth, uint8_t* tiles,
                                                          int32_t*, StripExcess&) {
  for (int64_t d = 0; d < depth; d += kTileBytes)
    pack_tile<Vectors<16>::f32>(b, strip * kTileRows, d, tiles + d * kTileRows);
}

void prepare_block(const PackedWeight&, uint8_t*, int64_t, uint8_t*) {}

// 32 rows by two strips, in four tiles.
__attribute__((target("amx-tile,amx-int8"))) void multiply_block(const PackedWeight& b, const uint8_t* a,
                                                                 int64_t a_stride, int64_t, const uint8_t*,
                                                                 int64_t first_strip, int64_t strips, int32_t* sums) {
  const int64_t strip = b.depth * kTileRows, columns = strips * kTileRows, sums_stride = columns * 4;
  const TileConfig config;
  _tile_loadconfig(&config);
  for (int64_t s = 0; s < strips; s += 2) {
    const uint8_t *b0 = b.tiles + (first_strip + s) * strip, *b1 = b0 + strip;
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    for (int64_t d = 0; d < b.depth; d += kTileBytes) {
      _tile_loadd(4, a + d, a_stride);
      _tile_loadd(6, b0 + d * kTileRows, kTileBytes);
      _tile_dpbssd(0, 4, 6);
      _tile_loadd(7, b1 + d * kTileRows, kTileBytes);
      _tile_dpbssd(1, 4, 7);
      _tile_loadd(5, a + kTileRows * a_stride + d, a_stride);
      _tile_dpbssd(2, 5, 6);
      _tile_dpbssd(3, 5, 7);
    }
    int32_t* to = sums + s * kTileRows;
    _tile_stored(0, to, sums_stride);
    _tile_stored(1, to + kTileRows, sums_stride);
    _tile_stored(2, to + kTileRows * columns, sums_stride);
    _tile_stored(3, to + kTileRows * columns + kTileRows, sums_stride);
  }
  _tile_release();
}

}  // namespace

// Few rows, for which the memory of b binds, are multiplied by VNNI.
const Int8Kernel& amx_int8() {
  static const Int8Kernel kernel = [] {
    Int8Kernel k = avx512_vnni_int8();
    k.few_rows_unpacked = k.few_rows;  // more go by tiles, which VNNI's measurements say nothing of
    k.pack_strip = pack_strip, k.prepare_block = prepare_block, k.multiply_block = multiply_block;
    return k;
  }();
  return kernel;
}

}  // namespace forwardpass::cpu
#endif
