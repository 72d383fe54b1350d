// int8_grouped_gemm on mma.sync m16n8k32: int8_gemm's tiles.
#include "device/gemm_sm80.cuh"
#include "kernels/gemm.h"
#include "params/int8_grouped_gemm.h"

namespace forwardpass {

using Tile128x128 =
    MmaConfig<Grouped<Int8>,
              MmaTile{.m = 128, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2}>;
using Tile64x128 =
    MmaConfig<Grouped<Int8>,
              MmaTile{.m = 64, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2}>;
using Tile16x128 =
    MmaConfig<Grouped<Int8>,
              MmaTile{.m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1}>;

namespace {

template <class Tile>
constexpr GemmKernel row(int blocks_per_sm = Tile::kBlocksPerSm) {
  return {.arch = sm_80,
          .tile_m = Tile::kM,
          .tile_n = Tile::kN,
          .experts = Tile::kExperts,
          .blocks_per_sm = blocks_per_sm,
          .launch = launch_gemm_mma<Tile>};
}
// Two blocks of 16 rows fit an A100's multiprocessor; an L40S has the second ones when the first have ended.
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>(2)};
const GemmKernels<Int8GroupedGemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
