// int8_gemm on wgmma m64nNk32.
#include "device/gemm_sm90a.cuh"
#include "kernels/gemm.h"
#include "params/int8_gemm.h"

namespace forwardpass {

// Main loop: a consumer warp issues 86 instructions for 2^20 multiply-adds (43 for four m64n256k32), 168 with the
// smaller tile. 168 registers at launch. A stage of 48 KB is used for 1024 clocks, if the tensor cores bind, while
// three more, 144 KB, are in flight. From L2 it takes 32 bytes a clock in clusters of two; an H100's multiprocessor is
// assumed to get 39. Shared memory: 48 KB written and 80 KB read by wgmma in 1024 clocks, all of its 128 bytes a clock.
using Tile128x256 = WgmmaConfig<Int8, WgmmaTile{.m = 128, .n = 256, .stages = 4}, ExactMainloop>;
// Twice as many tiles, for small products. L2 binds, at 48 bytes a clock in clusters: modelled, 512 x 4096 x 4096 takes
// 11.3 us; bound by the tensor cores it would take 8.9.
using Tile128x128 = WgmmaConfig<Int8, WgmmaTile{.m = 128, .n = 128, .stages = 6}, ExactMainloop>;
// Between them, for products whose last round of the others leaves multiprocessors idle: 40 KB a stage, 768 clocks.
using Tile128x192 = WgmmaConfig<Int8, WgmmaTile{.m = 128, .n = 192, .stages = 4}, ExactMainloop>;
// Few rows, which are the n16 or n64 of a wgmma: 16 KB of the weight per stage, of which an H100's multiprocessor needs
// 15 KB in flight (gemv_sm80.cu).
using Tile64x128 = WgmmaConfig<Int8, WgmmaTile{.m = 64, .n = 128, .stages = 8}, ExactMainloop>;
using Tile16x128 = WgmmaConfig<Int8, WgmmaTile{.m = 16, .n = 128, .stages = 8}, ExactMainloop>;

namespace {

template <class Tile>
constexpr GemmKernel row(int stage_clocks = 0) {
  return {.arch = sm_90a,
          .tile_m = Tile::kM,
          .tile_n = Tile::kN,
          .cluster = Cluster::along_m,
          .stage_clocks = stage_clocks,
          .cluster_sums = Tile::kClusterSums,
          .launch = launch_gemm_wgmma<Tile>,
          .resident_clusters = resident_clusters<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x256>(1084), row<Tile128x192>(860), row<Tile128x128>(656), row<Tile64x128>(),
                              row<Tile16x128>()};
const GemmKernels<Int8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
