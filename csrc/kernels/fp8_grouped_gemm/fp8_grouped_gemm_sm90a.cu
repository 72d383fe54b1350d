// fp8_grouped_gemm on wgmma m64nNk32 of e4m3: fp8_gemm's tiles.
#include "device/gemm_sm90a.cuh"
#include "kernels/gemm.h"
#include "params/fp8_grouped_gemm.h"

namespace forwardpass {

// Three stages of 128 x 256, as four leave no room for the list of experts. Modelled on an H100, 4096 rows of 2 experts
// by 4096 x 4096: scales of rows 90.0 us, as one product in four stages 89.3, of blocks 88.1 and 88.6.
using Tile128x256 = WgmmaConfig<Grouped<E4m3>, WgmmaTile{.m = 128, .n = 256, .stages = 3}, PromotingMainloop>;
using Tile128x128 = WgmmaConfig<Grouped<E4m3>, WgmmaTile{.m = 128, .n = 128, .stages = 6}, PromotingMainloop>;
using Tile64x128 = WgmmaConfig<Grouped<E4m3>, WgmmaTile{.m = 64, .n = 128, .stages = 8}, PromotingMainloop>;
using Tile16x128 = WgmmaConfig<Grouped<E4m3>, WgmmaTile{.m = 16, .n = 128, .stages = 8}, PromotingMainloop>;

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
const GemmKernel kernels[] = {row<Tile128x256>(1163), row<Tile128x128>(689), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<Fp8GroupedGemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
