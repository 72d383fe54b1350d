// fp8_grouped_gemm on mma.sync m16n8k32 of e4m3: fp8_gemm's tiles with block scales, which are 1 where a's and b's are
// of rows. That costs issue slots, of which enough are left: 853 instructions for 2^20
// multiply-adds, which take the tensor cores of an L40S's multiprocessor 1024 clocks; they are issued in 213.
#include "device/gemm_sm80.cuh"
#include "kernels/gemm.h"
#include "params/fp8_grouped_gemm.h"

namespace forwardpass {

using Tile128x128 =
    MmaConfig<Grouped<E4m3Blocks>,
              MmaTile{.m = 128, .n = 128, .warps_m = 2, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1}>;
// The largest that has room for the list of more than 144 experts.
using Tile64x128 =
    MmaConfig<Grouped<E4m3Blocks>,
              MmaTile{.m = 64, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1}>;
using Tile16x128 =
    MmaConfig<Grouped<E4m3Blocks>,
              MmaTile{.m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1}>;

namespace {

template <class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_89,
          .tile_m = Tile::kM,
          .tile_n = Tile::kN,
          .experts = Tile::kExperts,
          .launch = launch_gemm_mma<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<Fp8GroupedGemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
