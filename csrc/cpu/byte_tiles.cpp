#include "cpu/byte_tiles.h"

#if defined(__x86_64__)
#include <immintrin.h>

namespace forwardpass::cpu {
namespace {

// Tiles 0 to 3 are sums, 4 and 5 are whole tiles of a and of the panel, 6 and 7 what is left of the depth.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16};

  explicit TileConfig(int64_t left) {
    if (left == 0) return;
    row_bytes[6] = static_cast<uint16_t>(left), rows[6] = 16;
    row_bytes[7] = 64, rows[7] = static_cast<uint8_t>(left / 4);
  }
};

}  // namespace

__attribute__((target("amx-tile"))) void configure_byte_tiles(int64_t depth) {
  const TileConfig config(depth % AmxBytes::kDepth);
  _tile_loadconfig(&config);
}
__attribute__((target("amx-tile"))) void release_byte_tiles() { _tile_release(); }

__attribute__((target("amx-tile,amx-int8"))) void multiply_byte_tiles(const uint8_t* a, int64_t a_stride,
                                                                      const int8_t* panel, int64_t panel_row,
                                                                      int64_t depth, int32_t* sums) {
  constexpr int64_t kColumns = 64, kRow = kTilePanel * sizeof(int32_t);  // bytes of 16 columns; of a row of sums
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  int64_t d = 0;
  for (; d + AmxBytes::kDepth <= depth; d += AmxBytes::kDepth, panel += AmxBytes::kDepth / 4 * panel_row) {
    _tile_loadd(4, a + d, a_stride);
    _tile_loadd(5, panel, panel_row);
    _tile_dpbusd(0, 4, 5);
    _tile_loadd(5, panel + kColumns, panel_row);
    _tile_dpbusd(1, 4, 5);
    _tile_loadd(5, panel + 2 * kColumns, panel_row);
    _tile_dpbusd(2, 4, 5);
    _tile_loadd(5, panel + 3 * kColumns, panel_row);
    _tile_dpbusd(3, 4, 5);
  }
  if (d < depth) {
    _tile_loadd(6, a + d, a_stride);
    _tile_loadd(7, panel, panel_row);
    _tile_dpbusd(0, 6, 7);
    _tile_loadd(7, panel + kColumns, panel_row);
    _tile_dpbusd(1, 6, 7);
    _tile_loadd(7, panel + 2 * kColumns, panel_row);
    _tile_dpbusd(2, 6, 7);
    _tile_loadd(7, panel + 3 * kColumns, panel_row);
    _tile_dpbusd(3, 6, 7);
  }
  _tile_stored(0, sums, kRow);
  _tile_stored(1, sums + 16, kRow);
  _tile_stored(2, sums + 32, kRow);
  _tile_stored(3, sums + 48, kRow);
}

}  // namespace forwardpass::cpu
#endif
