#pragma once
// Split-K whose splits are the blocks of a cluster, which has one tile: each block leaves its partial sums in shared
// memory, and adds those of all for its share of the outputs, in the order of the splits. So the bits are the same each
// time, and those that the way through the workspace gives; but nothing goes there, and no second kernel is launched.
#include "device/epilogue/staged.cuh"
#include "device/ptx_sm90a.cuh"
#include "schedule/gemm_tile.cuh"

namespace forwardpass {

constexpr int kConsumerBarrier = 1;  // a named barrier of a block's consumers; 0 is __syncthreads

template <class Config>
struct ClusterSums {
  using Acc = typename Config::Acc;
  static constexpr bool kSwapAB = Config::Element::kSwapAB;
  static constexpr int kRows = kSwapAB ? Config::kN : Config::kM, kColumns = kSwapAB ? Config::kM : Config::kN,
                       kWarps = Config::kWarps;
  static_assert(kColumns == 128);
  using Sums = StagedTile<kRows, kColumns>;
  using Shared = typename Config::SharedStorage;

  // By the consumers: a warp's accumulators, which are at (row, column) of the tile.
  __device__ static void stage(const typename Config::Accumulators& acc, Shared& shared, int row, int column) {
    Sums& sums = in_place_of_stages(shared);
    // Else every launch computes all addresses before its first tile, whether it has splits or not.
    row = ptx::unknown(row);
    column = ptx::unknown(column);
    ptx::barrier_sync(kConsumerBarrier, 32 * kWarps);  // wgmmas of the others may still read the stages
#pragma unroll
    for (int j = 0; j < Config::kTilesN; ++j) {
      if constexpr (kSwapAB) {
        stage_transposed(sums, column + j * 8, row, acc[0][j]);
      } else if constexpr (Config::kTransposed) {
        stage_transposed(sums, row + j * 8, column, acc[0][j]);
      } else {
        stage_accumulators(sums, row, column + j * 8, acc[0][j]);
      }
    }
  }

  // By the consumers of every block of the cluster, whose other threads come to the barrier.
  __device__ static void add(Shared& shared, const GemmOutput& o, const TileMap& map, const GemmTile& tile) {
    const bool gated = is_gated(o.epilogue.activation);
    // A warp has eight rows by four vectors, so that loads are free of bank conflicts; then others with the same
    // columns. Its first are next to those of the same warp in other blocks, as all of these have few.
    const int width = gated ? 2 * kVec : kVec, across = kColumns / (4 * width),
              splits = ptx::cluster_size() >> map.share_bits, part = threadIdx.x / 32 * splits + tile.split,
              c = (part % across * 4 + thread_in_group()) * width;
    const int64_t row = kSwapAB ? tile.column : tile.row, column = (kSwapAB ? tile.row : tile.column) + c;
    const int n = static_cast<int>(min(int64_t{kVec}, o.columns - column)),
              rows = n > 0 ? static_cast<int>(min(int64_t{kRows}, o.rows - row)) : 0;
    const EpilogueColumns<Acc> columns(o.epilogue, o.access, column, n);
    ptx::cluster_sync();
#pragma unroll 1
    for (int r = part / across * 8 + group_id(); r < rows; r += splits * kWarps / across * 8) {
      const Vec<Acc> acc = sum(shared, r, c, map.share_bits, splits);
      float y[kVec];
      epilogue_values(
          y, o.epilogue, o.access, [&] { return columns; }, row + r, column, n, acc,
          gated ? sum(shared, r, c + kVec, map.share_bits, splits) : acc);
      store_output<Config::Element::k16Bits>(y, o.epilogue, o.access, row + r, gated ? column / 2 : column, n);
    }
  }

 private:
  __device__ static Sums& in_place_of_stages(Shared& shared) {
    static_assert(sizeof(Sums) <= sizeof(shared.stage));
    return reinterpret_cast<Sums&>(shared.stage);
  }
  // Of eight columns of a row.
  __device__ static Vec<Acc> sum(Shared& shared, int row, int column, int share_bits, int splits) {
    const uint32_t sharing = ptx::cluster_rank() & ((1 << share_bits) - 1);
    uint32_t here[2];
#pragma unroll
    for (int half = 0; half < 2; ++half)
      here[half] = ptx::shared_address(&in_place_of_stages(shared).template at<Acc>(row, column + half * 4));
    Vec<Acc> part[kClusterBlocks];  // all on their way at once
#pragma unroll
    for (int split = 0; split < kClusterBlocks; ++split)
      if (split < splits)
#pragma unroll
        for (int half = 0; half < 2; ++half)
          reinterpret_cast<uint4*>(part[split].e)[half] =
              ptx::load_cluster(ptx::map_shared(here[half], (split << share_bits) + sharing));
#pragma unroll
    for (int split = 1; split < kClusterBlocks; ++split)
      if (split < splits)
#pragma unroll
        for (int i = 0; i < kVec; ++i) part[0].e[i] += part[split].e[i];
    return part[0];
  }
};

}  // namespace forwardpass
