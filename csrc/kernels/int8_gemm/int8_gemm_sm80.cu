// int8_gemm on mma.sync m16n8k32.
#include "device/gemm_sm80.cuh"
#include "kernels/gemm.h"
#include "params/int8_gemm.h"

namespace forwardpass {

// Three stages of 64: while one is used, 128 of K are in flight, which last 1024 clocks of an A100's multiprocessor
// with two blocks each and cover its memory latency. 48 KB per block, so that two fit the 100 KB of an L40S.
using Tile128x128 =
    MmaConfig<Int8,
              MmaTile{.m = 128, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2}>;
using Tile64x128 =
    MmaConfig<Int8,
              MmaTile{.m = 64, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2}>;
// Memory binds: 128 of K per stage, whole cache lines of the weight, and four stages, 54 KB in flight.
using Tile16x128 =
    MmaConfig<Int8,
              MmaTile{.m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1}>;

namespace {

template <class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_80, .tile_m = Tile::kM, .tile_n = Tile::kN, .launch = launch_gemm_mma<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<Int8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
