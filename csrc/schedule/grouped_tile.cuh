#pragma once
// Which tiles of a grouped GEMM's output a block computes. Only the device knows how many rows each expert has, so that
// no host waits and a captured launch replays with others: each block makes a list of the experts in shared memory, and
// finds its tiles there. A tile is of one expert; its rows beyond that one's last are read and not stored.
#include <algorithm>

#include "params/gemm.h"
#include "schedule/gemm_tile.cuh"
#include "schedule/persistent.cuh"

namespace forwardpass {

struct GroupTile : GemmTile {
  int expert;
  uint32_t index;  // of the schedule's tiles
};

// At most so many rows of tiles, of all experts, each of `height` rows of the output: a tile's, or those of a cluster's
// blocks, whose tiles lie below each other.
inline int64_t most_tile_rows(const Groups& g, int64_t rows, int height) {
  return g.sorted ? std::min(rows / height + g.experts, rows) : g.experts * ceil_div(g.room, height);
}

// The list's memory, of up to so many experts; a launch has it for those that there are.
template <int kExperts>
struct ExpertStorage {
  static constexpr int kBytesOfOne = sizeof(int32_t) + sizeof(uint16_t);
  alignas(16) uint8_t bytes[kExperts * kBytesOfOne];
};
template <>
struct ExpertStorage<0> {};
// Bytes that a launch leaves out.
template <int kExperts>
int unused_bytes(int experts) {
  return (kExperts - experts) * ExpertStorage<kExperts>::kBytesOfOne / 16 * 16;
}

struct ExpertList {
  const Groups& groups;
  int32_t* const rows_end;   // of each expert, behind its last
  uint16_t* const tile_end;  // rows of tiles of the experts up to it

  template <class Storage>
  __device__ ExpertList(const Groups& groups, Storage& storage)
      : groups(groups),
        rows_end(reinterpret_cast<int32_t*>(storage.bytes)),
        tile_end(reinterpret_cast<uint16_t*>(rows_end + groups.experts)) {}

  // By one warp, of whose lanes each has experts beside each other. An end is at least the one before, and at most
  // `rows`; a count from 0 to the room. height_bits: log2 of the rows of a row of tiles.
  __device__ void make(int rows, int height_bits) const {
    const int lane = threadIdx.x % 32, share = (groups.experts + 31) / 32, first = min(lane * share, groups.experts),
              last = min(first + share, groups.experts), room = static_cast<int>(groups.room),
              most = groups.sorted ? rows : room;
#pragma unroll 4
    for (int e = lane; e < groups.experts; e += 32) rows_end[e] = max(min(groups.ends[e], most), 0);
    __syncwarp();
    int end = 0;
    if (groups.sorted) {
      for (int e = first; e < last; ++e) end = max(end, rows_end[e]);
      end = of_lanes_before(end, [](int a, int b) { return max(a, b); });
      for (int e = first; e < last; ++e) rows_end[e] = end = max(end, rows_end[e]);
    } else {
      for (int e = first; e < last; ++e) rows_end[e] += e * room;
    }
    __syncwarp();
    int tiles = 0;
    for (int e = first; e < last; ++e) tiles += tiles_of(e, height_bits);
    tiles = of_lanes_before(tiles, [](int a, int b) { return a + b; });
    for (int e = first; e < last; ++e) tile_end[e] = static_cast<uint16_t>(tiles += tiles_of(e, height_bits));
  }

  __device__ int rows_begin(int expert) const {
    return !groups.sorted ? expert * static_cast<int>(groups.room) : expert == 0 ? 0 : rows_end[expert - 1];
  }
  __device__ int tile_begin(int expert) const { return expert == 0 ? 0 : tile_end[expert - 1]; }
  __device__ int tile_rows() const { return tile_end[groups.experts - 1]; }
  // The expert that has this row of tiles.
  __device__ int expert_of(uint32_t tile_row) const {
    int expert = 0;
#pragma unroll 1
    for (int step = 1 << (31 - __clz(groups.experts)); step > 0; step /= 2)
      if (expert + step < groups.experts && tile_end[expert + step - 1] <= tile_row) expert += step;
    return expert;
  }
  // Whether no expert has this row of the output, which is none before first_unowned().
  __device__ int first_unowned() const { return groups.sorted ? rows_end[groups.experts - 1] : 0; }
  __device__ bool unowned(int row) const {
    return groups.sorted || row >= rows_end[row / static_cast<int>(groups.room)];
  }

 private:
  __device__ int tiles_of(int expert, int height_bits) const {
    return (rows_end[expert] - rows_begin(expert) + ((1 << height_bits) - 1)) >> height_bits;
  }
  // f of what the lanes before have, 0 if there are none.
  template <class F>
  __device__ static int of_lanes_before(int v, F f) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int d = 1; d < 32; d *= 2) {
      const int before = __shfl_up_sync(0xffffffff, v, d);
      if (lane >= d) v = f(v, before);
    }
    const int before = __shfl_up_sync(0xffffffff, v, 1);
    return lane == 0 ? 0 : before;
  }
};

// The schedule: f(tile) for one tile after the other of a block. Blocks that run at the same time have the same expert,
// whose weight they share in L2.
template <class Config>
struct GroupedTiles {
  static constexpr uint32_t split = 0;
  const uint32_t rank;  // of the blocks of a cluster, whose tiles lie below each other
  const TileMap& map;
  const int64_t& columns;  // of an expert
  const ExpertList list;

  template <class Arguments, class SharedStorage>
  __device__ GroupedTiles(const Arguments& p, SharedStorage& s)
      : rank(Config::rank()), map(p.map), columns(p.out.columns), list(p.groups, s.experts) {}
  // By one warp.
  __device__ void make_list(int rows) const { list.make(rows, 31 - __clz(Config::kM << map.share_bits)); }
  template <class F>
  __device__ void for_each(F f) const {
    for_each_tile(tiles(), blockIdx.x >> map.share_bits, gridDim.x >> map.share_bits,
                  [&](uint32_t index) { f(at(index)); });
  }
  __device__ uint32_t tiles() const { return list.tile_rows() * map.tiles_n; }
  __device__ GroupTile at(uint32_t index) const {
    const int expert = list.expert_of(index / map.tiles_n);
    const uint32_t first = list.tile_begin(expert);
    TileMap of_expert = map;
    of_expert.tiles_m = list.tile_end[expert] - first;
    GroupTile tile{of_expert.at<Config::kM, Config::kN>(index - first * map.tiles_n, map.share_bits, rank), expert,
                   index};
    tile.row += list.rows_begin(expert);
    tile.b_row += expert * columns;
    tile.k = 0, tile.k_end = map.k, tile.split = 0;  // there is one split, but the compiler does not know
    return tile;
  }
};

// The same for blocks whose threads all multiply: a tile is in shared memory, as they lack the registers to keep it.
template <class Config>
struct SharedTiles : GroupedTiles<Config> {
  using Storage = GroupTile;
  GroupTile& tile;

  template <class Arguments, class SharedStorage>
  __device__ SharedTiles(const Arguments& p, SharedStorage& s) : GroupedTiles<Config>(p, s), tile(s.tile) {}
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
