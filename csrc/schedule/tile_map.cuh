#pragma once
// Which block of a GEMM makes which tile.
#include "params/common.h"

namespace forwardpass {

// The map from a block's index to its output tile and its part of K. Blocks that run at the same time share operands in
// L2: eight rows of tiles are traversed column by column.
struct TileMap {
  static constexpr uint32_t kGroup = 8;
  uint32_t tiles_m, tiles_n;  // 2^32 tiles would have 2^46 outputs

  struct Tile {
    int64_t m, n;
    int split;
  };
  TileMap(int64_t m, int64_t n) : tiles_m(static_cast<uint32_t>(m)), tiles_n(static_cast<uint32_t>(n)) {}
  HOST_DEVICE uint32_t blocks(int64_t splits) const { return tiles_m * tiles_n * static_cast<uint32_t>(splits); }
  __device__ Tile at(uint32_t block) const {
    const uint32_t tiles = tiles_m * tiles_n, index = block % tiles, group = index / (kGroup * tiles_n),
                   first = group * kGroup, rows = min(kGroup, tiles_m - first), within = index % (kGroup * tiles_n);
    return {first + within % rows, within / rows, static_cast<int>(block / tiles)};
  }
};

}  // namespace forwardpass
