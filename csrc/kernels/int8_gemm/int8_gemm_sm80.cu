// int8_gemm on mma.sync m16n8k32.
#include "device/gemm_sm80.cuh"
#include "kernels/gemm.h"
#include "params/int8_gemm.h"

namespace forwardpass {

// Three stages of 64: while one is used, 128 of K are on their way, 1024 clocks of a multiprocessor of an A100 with two
// blocks each, which covers the latency of its memory. 48 KB a block, so two fit the 100 KB of an L40S.
using Tile128x128 = MmaConfig<Int8, 128, 128, 2, 2, 64, 3, 2>;
using Tile64x128 = MmaConfig<Int8, 64, 128, 2, 2, 64, 3, 2>;
// Memory binds: 128 of K a stage, whole lines of the weight, and four stages, 54 KB on their way.
using Tile16x128 = MmaConfig<Int8, 16, 128, 1, 4, 128, 4, 1>;

template <class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_80, .tile_m = Tile::kM, .tile_n = Tile::kN, .launch = launch_gemm_mma<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<Int8GemmParams> registered(kernels);

}  // namespace forwardpass
