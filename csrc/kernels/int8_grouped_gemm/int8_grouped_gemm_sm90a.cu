// int8_grouped_gemm on wgmma m64nNk32: int8_gemm's tiles.
#include "device/gemm_sm90a.cuh"
#include "kernels/gemm.h"
#include "params/int8_grouped_gemm.h"

namespace forwardpass {

using Tile128x256 = WgmmaConfig<Grouped<Int8>, WgmmaTile{.m = 128, .n = 256, .stages = 4}, ExactMainloop>;
using Tile128x128 = WgmmaConfig<Grouped<Int8>, WgmmaTile{.m = 128, .n = 128, .stages = 6}, ExactMainloop>;
using Tile64x128 = WgmmaConfig<Grouped<Int8>, WgmmaTile{.m = 64, .n = 128, .stages = 8}, ExactMainloop>;
using Tile16x128 = WgmmaConfig<Grouped<Int8>, WgmmaTile{.m = 16, .n = 128, .stages = 8}, ExactMainloop>;

namespace {

template <class Tile>
constexpr GemmKernel row(int stage_clocks = 0) {
  return {.arch = sm_90a,
          .tile_m = Tile::kM,
          .tile_n = Tile::kN,
          .cluster = Cluster::along_m,
          .stage_clocks = stage_clocks,
          .experts = Tile::kExperts,
          .launch = launch_gemm_wgmma<Tile>,
          .resident_clusters = resident_clusters<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x256>(1084), row<Tile128x128>(656), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<Int8GroupedGemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
