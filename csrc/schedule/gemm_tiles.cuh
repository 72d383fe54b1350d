#pragma once
// What the GEMMs on mma.sync and on wgmma share: the types of their operands, and which block makes which tile.
#include "params/gemm.h"

namespace forwardpass {

// Element types of the operands: what an mma adds to, the bytes of an element of b, whether operands are
// exchanged (a is what the operation calls b), and whether sums have to be promoted. An fp8 mma keeps 13 bits of the
// largest product or sum (arXiv 2511.10909), so what it made of 128 of K goes to an fp32 sum. int8 is exact.
struct Int8 {
  using Acc = int32_t;
  static constexpr Dtype kAcc = Dtype::i32;
  static constexpr int kSizeB = 1;
  static constexpr bool kExchanged = false, kPromoted = false, kBlockScaled = false;
};
struct E4m3 {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = 1;
  static constexpr bool kExchanged = false, kPromoted = true, kBlockScaled = false;
};
// with scales of blocks, by which each partial sum is multiplied as it is promoted: a branch of the same kernel
// would spill 1196 bytes
struct E4m3Blocks : E4m3 {
  static constexpr bool kBlockScaled = true;
};

// The map from a block to its tile and its part of K. Blocks that run together share operands in L2: eight rows of
// tiles are gone through column by column.
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
