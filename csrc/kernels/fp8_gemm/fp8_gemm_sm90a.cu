// fp8_gemm on wgmma m64nNk32 of e4m3, promoted to fp32 every 128 of K.
#include "device/gemm_sm90a.cuh"
#include "kernels/gemm.h"
#include "params/fp8_gemm.h"

namespace forwardpass {

// Main loop: a consumer warp issues 416 instructions for 2^20 multiply-adds (208 for eight m64n128k32, 128 of them the
// promotion), 492 with the smaller tile. Registers: 128 accumulators, 64 partial ones, 16 of a. The 256 columns of a
// warpgroup are two groups of fp8_gemm_quantize or, of a gated product, one. Shared memory: 80 KB read and 48 KB
// written a stage, in the tensor cores' 1024 clocks; with a in shared memory, or 128 x 128 a warpgroup, 96 KB were read
// (1303 clocks a stage, modelled; 1159 now).
using Tile128x256 = WgmmaConfig<E4m3, WgmmaTile{.m = 128, .n = 256, .stages = 4}, PromotingMainloop>;
using Tile128x128 = WgmmaConfig<E4m3, WgmmaTile{.m = 128, .n = 128, .stages = 6}, PromotingMainloop>;
// Between them, for products whose last round of the others leaves multiprocessors idle. With 96 accumulators and as
// many partial ones a warpgroup has all columns, so that wgmma reads 64 KB per stage of 40: 139 bytes a clock for 144.
using Tile128x192 = WgmmaConfig<E4m3, WgmmaTile{.m = 128, .n = 192, .stages = 4}, PromotingMainloop>;
// Few rows, as for int8.
using Tile64x128 = WgmmaConfig<E4m3, WgmmaTile{.m = 64, .n = 128, .stages = 8}, PromotingMainloop>;
using Tile16x128 = WgmmaConfig<E4m3, WgmmaTile{.m = 16, .n = 128, .stages = 8}, PromotingMainloop>;

namespace {

template <class Tile>
constexpr GemmKernel row(int stage_clocks = 0) {
  return {.arch = sm_90a,
          .tile_m = Tile::kM,
          .tile_n = Tile::kN,
          .cluster = Cluster::along_m,
          .stage_clocks = stage_clocks,
          .quantizes = Tile::kQuantizes,
          .gated_blocks = Tile::kN % kScaleBlock == 0,  // else a tile has parts of four blocks
          .cluster_sums = Tile::kClusterSums,
          .launch = launch_gemm_wgmma<Tile>,
          .resident_clusters = resident_clusters<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x256>(1163), row<Tile128x192>(893), row<Tile128x128>(689), row<Tile64x128>(),
                              row<Tile16x128>()};
const GemmKernels<Fp8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
