#pragma once
// Schedules of a GEMM: which tiles a block computes, of which output, and which part of K. A kernel names none, and
// asks its Config's
//
//   begin()       once, before the first tile: by all threads of a block
//   for_each(f)   f(tile), a GemmTile or what is derived from one
//   Output, enter(tile, output, epilogue, s)   where the tile's outputs go, once its epilogue may begin
//   store(…)      of those on wgmma: a tile's accumulators, to the epilogue or to other blocks
//   finish(…)     after the last tile
//
// and on the host how many rows of tiles there are, and whether blocks are persistent.
#include "device/epilogue/output.cuh"
#include "params/gemm.h"

namespace forwardpass {

struct GemmTile {
  static constexpr int expert = 0;  // of a grouped GEMM: which one has the tile

  int64_t row, column;  // of the output, the tile's first
  int64_t b_row;        // of b, the tile's first: its column, behind the rows of the experts before
  int64_t k, k_end;     // the part of K
  int split;            // which part

  // Slices of `depth` of K, the last of which may be ragged.
  __device__ int slices(int depth) const { return static_cast<int>((k_end - k + depth - 1) / depth); }
};

// The map from a block's index to its tile. Blocks that run at the same time share operands in L2: eight rows of tiles
// are traversed column by column. A cluster counts as one block, whose tiles lie below each other; or of each of its
// splits they do.
struct TileMap {
  static constexpr uint32_t kGroup = 8;
  uint32_t tiles_m, tiles_n;  // 2^32 tiles would have 2^46 outputs
  uint32_t tiles;             // times splits
  uint32_t share_bits;        // log2 of the blocks of a cluster that have tiles below each other
  int64_t k, split_k;         // columns of a and b; of one split

  TileMap(int64_t tiles_m, int64_t tiles_n, int64_t splits, int64_t k, int64_t split_k, uint32_t share_bits = 0)
      : tiles_m(static_cast<uint32_t>(tiles_m)),
        tiles_n(static_cast<uint32_t>(tiles_n)),
        tiles(static_cast<uint32_t>(tiles_m * tiles_n * splits)),
        share_bits(share_bits),
        k(k),
        split_k(split_k) {}
  __device__ uint32_t share() const { return 1 << share_bits; }
  // shared: share_bits, where there are clusters; rank: which of the blocks with tiles below each other this one is;
  // split: of its cluster
  template <int kM, int kN>
  __device__ GemmTile at(uint32_t index, uint32_t shared = 0, uint32_t rank = 0, uint32_t split = 0) const {
    const uint32_t tile = index % (tiles_m * tiles_n), group = tile / (kGroup * tiles_n), first = group * kGroup,
                   rows = min(kGroup, tiles_m - first), within = tile % (kGroup * tiles_n);
    return tile_at(((first + within % rows << shared) + rank) * int64_t{kM}, int64_t{within / rows} * kN,
                   index / (tiles_m * tiles_n) + split);
  }
  // Where all tiles lie beside each other.
  template <int kN>
  __device__ GemmTile in_one_row(uint32_t index) const {
    return tile_at(0, int64_t{index % tiles_n} * kN, index / tiles_n);
  }

 private:
  __device__ GemmTile tile_at(int64_t row, int64_t column, uint32_t split) const {
    return {row, column, column, split * split_k, min((split + 1) * split_k, k), static_cast<int>(split)};
  }
};

// Of a schedule whose tiles are all of one output.
struct WholeOutput {
  using Output = const GemmOutput&;
  static constexpr bool kAlignedRows = true;  // a tile's first row is a multiple of its height

  // height: rows of the output in a row of tiles, or in those of a cluster's blocks, which lie below each other
  static int64_t tile_rows(const GemmParams&, int64_t rows, int height) { return ceil_div(rows, height); }
  __device__ void begin(int) const {}
  template <class Tile, class Epilogue, class SharedStorage>
  __device__ void enter(const Tile&, const GemmOutput&, Epilogue&, SharedStorage&) const {}
};

// A tile for each block.
template <class Config>
struct OneTile : WholeOutput {
  static constexpr bool kPersistent = false;
  struct Storage {};
  const TileMap& map;

  template <class Arguments, class SharedStorage>
  __device__ OneTile(const Arguments& p, const SharedStorage&) : map(p.map) {}
  template <class F>
  __device__ void for_each(F f) const {
    f(map.at<Config::kM, Config::kN>(blockIdx.x));
  }
  __device__ void finish(const GemmOutput&, int, int) const {}
};

}  // namespace forwardpass
