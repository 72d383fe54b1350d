// fp8_gemm on wgmma m64nNk32 of e4m3, promoted to fp32 every 128 of K.
#include "device/gemm_sm90a.cuh"
#include "kernels/gemm.h"
#include "params/fp8_gemm.h"

namespace forwardpass {

// Main loop: a consumer warp issues 412 instructions for 2^20 multiply-adds (206 for eight m64n128k32, 128 of them the
// promotion), 468 with the smaller tile. Registers: 128 accumulators and 64 partial ones; 256 x 128, with one warpgroup
// below the other, would take as many, but of a gated product this tile has 128 outputs, a group of fp8_gemm_quantize.
// Shared memory is what binds: wgmma reads 96 KB per stage, 16 more than for int8, as each 64 rows read all of b.
using Tile128x256 = WgmmaConfig<E4m3, WgmmaTile{.m = 128, .n = 256, .consumers_m = 1, .stages = 4}, PromotingMainloop>;
using Tile128x128 = WgmmaConfig<E4m3, WgmmaTile{.m = 128, .n = 128, .consumers_m = 2, .stages = 6}, PromotingMainloop>;
// Between them, for products whose last round of the others leaves multiprocessors idle. With 96 accumulators and as
// many partial ones a warpgroup has all columns, so that wgmma reads 64 KB per stage of 40: 139 bytes a clock for 144.
using Tile128x192 = WgmmaConfig<E4m3, WgmmaTile{.m = 128, .n = 192, .consumers_m = 2, .stages = 4}, PromotingMainloop>;
// Few rows, as for int8.
using Tile64x128 = WgmmaConfig<E4m3, WgmmaTile{.m = 64, .n = 128, .consumers_m = 1, .stages = 8}, PromotingMainloop>;
using Tile16x128 = WgmmaConfig<E4m3, WgmmaTile{.m = 16, .n = 128, .consumers_m = 1, .stages = 8}, PromotingMainloop>;

namespace {

template <class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_90a,
          .tile_m = Tile::kM,
          .tile_n = Tile::kN,
          .cluster = Cluster::along_m,
          .quantizes = Tile::kQuantizes,
          .gated_blocks = Tile::kN % kScaleBlock == 0,  // else a tile has parts of four blocks
          .cluster_sums = Tile::kClusterSums,
          .launch = launch_gemm_wgmma<Tile>,
          .resident_clusters = resident_clusters<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x256>(), row<Tile128x192>(), row<Tile128x128>(), row<Tile64x128>(),
                              row<Tile16x128>()};
const GemmKernels<Fp8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
