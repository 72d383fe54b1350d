#pragma once
// Schedules of grouped GEMMs, whose blocks are persistent: they find their tiles in a list of experts. A tile is of one
// expert; its rows beyond that one's last are read and not stored.
#include "schedule/gemm_tile.cuh"
#include "schedule/grouped_output.cuh"
#include "schedule/persistent.cuh"

namespace forwardpass {

struct GroupTile : GemmTile {
  int expert;
  uint32_t index;  // of the schedule's tiles
};

// What they share. Blocks that run at the same time have the same expert, whose weight they share in L2.
template <class Config>
struct ExpertSchedule {
  using Output = GroupOutput;
  static constexpr bool kPersistent = true, kAlignedRows = false;
  const uint32_t rank;  // of the blocks of a cluster, whose tiles lie below each other
  const TileMap& map;
  const int64_t& columns;  // of an expert
  const ExpertList list;

  static int64_t tile_rows(const GemmParams& p, int64_t rows, int height) {
    return most_tile_rows(p.groups, rows, height);
  }
  template <class Arguments, class SharedStorage>
  __device__ ExpertSchedule(const Arguments& p, SharedStorage& s, uint32_t rank)
      : rank(rank),
        map(p.map),
        columns(p.out.columns),
        list(p.groups, 31 - __clz(Config::kM), map.share_bits, s.experts) {}
  __device__ uint32_t tiles() const { return list.tile_rows() * map.tiles_n; }
  __device__ GroupTile at(uint32_t index) const {
    const int expert = list.expert_of(index / map.tiles_n);
    const uint32_t first = list.tile_begin(expert);
    TileMap of_expert = map;
    of_expert.tiles_m = list.tile_end(expert) - first;
    GroupTile tile{of_expert.at<Config::kM, Config::kN>(index - first * map.tiles_n, map.share_bits, rank), expert,
                   index};
    tile.row += list.rows_begin(expert);
    tile.b_row += expert * columns;
    tile.k = 0, tile.k_end = map.k, tile.split = 0;  // there is one split, but the compiler does not know
    return tile;
  }
  template <class Epilogue, class SharedStorage>
  __device__ void enter(const GroupTile& tile, GroupOutput& output, Epilogue& epilogue, SharedStorage& s) const {
    output.take(tile.expert, list);
    epilogue.find_staging(s);
  }
  // By each of a block's `warps` warps that come here.
  __device__ void finish(const GemmOutput& output, int warp, int warps) const {
    fill_unowned_rows(list, output, blockIdx.x * warps + warp, gridDim.x * warps);
  }
};

// For blocks whose threads all multiply: a tile is in shared memory, as they lack the registers to keep it.
template <class Config>
struct GroupedTiles : ExpertSchedule<Config> {
  using Storage = GroupTile;
  GroupTile& tile;

  template <class Arguments, class SharedStorage>
  __device__ GroupedTiles(const Arguments& p, SharedStorage& s) : ExpertSchedule<Config>(p, s, 0), tile(s.tile) {}
  __device__ void begin(int rows) const {
    if (threadIdx.x / 32 == 0) this->list.make(rows);  // `threadIdx.x < 32` made main loops of w8a16 0.5 % longer
    __syncthreads();
  }
  template <class F>
  __device__ void for_each(F f) const {
    for (uint32_t index = blockIdx.x; index < this->tiles(); index = tile.index + gridDim.x) {
      __syncthreads();  // where others stage outputs the next tile's stages are
      if (threadIdx.x == 0) tile = this->at(index);
      __syncthreads();
      f(tile);
    }
  }
};

}  // namespace forwardpass
