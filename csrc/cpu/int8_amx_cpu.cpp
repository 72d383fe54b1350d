// The int8 GEMM on AMX tiles. A tile is 16 rows of 64 bytes; one instruction adds the products of 64 columns to 16 x 16
// int32, in 16 cycles.
#include "cpu/int8_tiers.h"

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu/capability.h"
#include "cpu/int8_blocks.h"

namespace forwardpass {

#if defined(__x86_64__)
namespace cpu {
namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

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

struct AmxTier {
  static constexpr int64_t kColumns = 2 * kTileRows;  // by 32 rows, in four tiles
  const int64_t columns, depth;
  const CacheLines tiles;

  struct Scope {
    explicit Scope(const AmxTier&) { configure(); }
    ~Scope() { release(); }
  };

  AmxTier(int64_t columns, int64_t depth) : columns(columns), depth(depth), tiles(allocate(columns * depth)) {}

  __attribute__((target("arch=x86-64-v4"))) void pack(const Matrix& b, int64_t strip) {
    uint8_t* to = tiles[0].bytes + strip * depth * kTileRows;
    for (int64_t d = 0; d < depth; d += kTileBytes) pack_tile(b, strip * kTileRows, d, to + d * kTileRows);
  }

  __attribute__((target("amx-tile,amx-int8"))) void multiply(Scope&, uint8_t* a, int64_t a_stride, int64_t,
                                                             int32_t* sums) const {
    const int64_t strip = depth * kTileRows, sums_stride = columns * 4;
    for (int64_t c = 0; c < columns; c += kColumns) {
      const uint8_t *b0 = tiles[0].bytes + c / kTileRows * strip, *b1 = b0 + strip;
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
};

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

void int8_amx([[maybe_unused]] const Matrix& a, [[maybe_unused]] const Matrix& b,
              [[maybe_unused]] const Epilogue& epilogue, [[maybe_unused]] const QuantizeParams* quantize) {
#if defined(__x86_64__)
  cpu::int8_blocks<cpu::AmxTier>(a, b, epilogue, quantize);
#endif
}

}  // namespace forwardpass
