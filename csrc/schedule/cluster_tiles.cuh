#pragma once
// Schedules of persistent blocks in clusters. The blocks of a cluster share b by `share`, and have tiles below each
// other. Beside what each schedule has (gemm_tile.cuh),
//
//   store(acc, tile, epilogue, s, place)   by the consumers, whose part of the tile is at `place`
//   finish(s, output)                      by the consumers
//   join(p)                                by the others, once all that they load is under way
#include "device/pipeline.cuh"
#include "schedule/cluster_sums.cuh"
#include "schedule/gemm_tile.cuh"
#include "schedule/grouped_tile.cuh"
#include "schedule/persistent.cuh"

namespace forwardpass {

template <class Config>
struct PersistentTiles : WholeOutput {
  static constexpr bool kPersistent = true, kClusterSums = false;
  const TileMap& map;
  const uint32_t rank, split;

  template <class Arguments, class SharedStorage>
  __device__ PersistentTiles(const Arguments& p, const SharedStorage&) : PersistentTiles(p.map, uint32_t{0}) {}
  __device__ PersistentTiles(const TileMap& map, uint32_t split)
      : map(map), rank(ptx::cluster_rank() & (map.share() - 1)), split(split) {}
  template <class F>
  __device__ void for_each(F f) const {
    const uint32_t cluster = ptx::cluster_size();
    for_each_tile(map.tiles, blockIdx.x / cluster, gridDim.x / cluster,
                  [&](uint32_t index) { f(map.at<Config::kM, Config::kN>(index, map.share_bits, rank, split)); });
  }
  __device__ GemmTile first() const {
    return map.at<Config::kM, Config::kN>(blockIdx.x / ptx::cluster_size(), map.share_bits, rank, split);
  }
  template <class Epilogue, class SharedStorage, class Place>
  __device__ void store(typename Config::Accumulators& acc, const GemmTile& tile, Epilogue& epilogue, SharedStorage&,
                        const Place& place) const {
    epilogue(acc, tile, place.row, place.column);
  }
  template <class SharedStorage>
  __device__ void finish(SharedStorage&, const GemmOutput&) const {}
  template <class Arguments>
  __device__ static void join(const Arguments&) {}
};

// The same where splits of K may be in a cluster, which adds their partial sums: behind the blocks that have one split
// of tiles below each other are those with the next. Larger tiles than 128 x 128 spill with the code of cluster sums;
// wider ones are not chosen where there are few.
template <class Config>
struct ClusterTiles : PersistentTiles<Config> {
  static constexpr bool kClusterSums = true;
  using Base = PersistentTiles<Config>;
  using Sums = ClusterSums<Config>;
  const bool& sums;  // the blocks of a cluster have all splits of its tiles

  template <class Arguments, class SharedStorage>
  __device__ ClusterTiles(const Arguments& p, const SharedStorage&)
      : Base(p.map, ptx::cluster_rank() >> p.map.share_bits), sums(p.cluster_sums) {}
  template <class Epilogue, class SharedStorage, class Place>
  __device__ void store(typename Config::Accumulators& acc, const GemmTile& tile, Epilogue& epilogue, SharedStorage& s,
                        const Place& place) const {
    if (sums) return Sums::stage(acc, s, place.row, place.column);
    epilogue(acc, tile, place.row, place.column);
  }
  template <class SharedStorage>
  __device__ void finish(SharedStorage& s, const GemmOutput& output) const {
    if (!sums) return;
    const TileMap& map = this->map;
    Sums::add(s, output, map, Base(map, ptx::cluster_rank() >> map.share_bits).first());
  }
  template <class Arguments>
  __device__ static void join(const Arguments& p) {
    if (p.cluster_sums) ptx::cluster_sync();  // as in ClusterSums::add
  }
};

// Those of a grouped GEMM.
template <class Config>
struct GroupedClusterTiles : ExpertSchedule<Config> {
  static constexpr bool kClusterSums = false;
  static constexpr uint32_t split = 0;
  using Base = ExpertSchedule<Config>;

  template <class Arguments, class SharedStorage>
  __device__ GroupedClusterTiles(const Arguments& p, SharedStorage& s) : Base(p, s, ptx::cluster_rank()) {}
  __device__ void begin(int rows) const {
    if (threadIdx.x >= 32) return;
    ptx::wait_for_earlier_kernels();
    this->list.make(rows);
  }
  template <class F>
  __device__ void for_each(F f) const {
    const uint32_t share_bits = this->map.share_bits;
    for_each_tile(this->tiles(), blockIdx.x >> share_bits, gridDim.x >> share_bits,
                  [&](uint32_t index) { f(this->at(index)); });
  }
  template <class Epilogue, class SharedStorage, class Place>
  __device__ void store(typename Config::Accumulators& acc, const GroupTile& tile, Epilogue& epilogue, SharedStorage&,
                        const Place& place) const {
    epilogue(acc, tile, place.row, place.column);
  }
  template <class SharedStorage>
  __device__ void finish(SharedStorage&, const GemmOutput& output) const {
    Base::finish(output, uniform(threadIdx.x / 32), Config::kWarps);
  }
  template <class Arguments>
  __device__ static void join(const Arguments&) {}
};

}  // namespace forwardpass
