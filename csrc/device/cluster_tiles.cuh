#pragma once
// Which tiles of a GEMM's output a persistent block of a cluster computes.
#include "device/ptx_sm90a.cuh"
#include "schedule/gemm_tile.cuh"
#include "schedule/persistent.cuh"

namespace forwardpass {

// The schedule: f(tile) for one tile after the other, of a block in its cluster. Its blocks share b by `share`; behind
// those with one split of the tiles are those with the next.
template <class Config>
struct PersistentTiles {
  const TileMap& map;
  const uint32_t rank, split;

  template <class Arguments, class SharedStorage>
  __device__ PersistentTiles(const Arguments& p, const SharedStorage&) : PersistentTiles(p.map) {}
  __device__ explicit PersistentTiles(const TileMap& map)
      : map(map),
        rank(ptx::cluster_rank() & (map.share() - 1)),
        split(Config::kClusterSums ? ptx::cluster_rank() >> map.share_bits : 0) {}
  template <class F>
  __device__ void for_each(F f) const {
    const uint32_t cluster = ptx::cluster_size();
    for_each_tile(map.tiles, blockIdx.x / cluster, gridDim.x / cluster,
                  [&](uint32_t index) { f(map.at<Config::kM, Config::kN>(index, map.share_bits, rank, split)); });
  }
  __device__ GemmTile first() const {
    return map.at<Config::kM, Config::kN>(blockIdx.x / ptx::cluster_size(), map.share_bits, rank, split);
  }
};

}  // namespace forwardpass
