// w8a16_gemm on mma.sync.
#include "device/w8a16_sm80.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

// Memory binds: three stages in flight, 48 KB of the weight, with one block per multiprocessor (an H100 needs 15 KB,
// see gemv_sm80.cu).
using Tile16x128 = W8a16Config<W8a16, W8a16Tile{.m = 16, .n = 128, .stages = 4, .blocks_per_sm = 1}>;
using Tile64x128 = W8a16Config<W8a16, W8a16Tile{.m = 64, .n = 128, .stages = 3, .blocks_per_sm = 1}>;
// Two stages are 96 KB, all that an L40S has: one is used, for 2048 clocks of an A100, while the other arrives. Two
// sets of accumulators are 128 registers, so eight warps per multiprocessor.
using Tile128x128 = W8a16Config<W8a16, W8a16Tile{.m = 128, .n = 128, .stages = 2, .blocks_per_sm = 1}>;

namespace {

template <class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_80, .tile_m = Tile::kM, .tile_n = Tile::kN, .launch = launch_gemm_mma<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<W8a16GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
