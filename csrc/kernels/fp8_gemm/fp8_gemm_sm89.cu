// fp8_gemm on mma.sync m16n8k32 of e4m3, promoted to fp32 every 128 of K.
#include "device/gemm_sm80.cuh"
#include "kernels/gemm.h"
#include "params/fp8_gemm.h"

namespace forwardpass {

// Three stages of 128, 98 of the 99 KB that a block may have on an L40S: while one is used, for 2048 clocks, two are in
// flight. A warp's 64 x 32 leaves room for as many partial accumulators; 64 x 48 and 64 x 64 spilled 64 and 1196 bytes.
// L2: 16 bytes a clock for a multiprocessor, which gets about 14 on an L40S (5 TB/s for 142 at 2.5 GHz, published):
// there L2 binds 128 x 128, at 7/8 of the peak.
template <class E>
using Tile128x128 =
    MmaConfig<E,
              MmaTile{.m = 128, .n = 128, .warps_m = 2, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1}>;
template <class E>
using Tile64x128 =
    MmaConfig<E,
              MmaTile{.m = 64, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1}>;
// Memory binds: four stages, 54 KB in flight.
template <class E>
using Tile16x128 =
    MmaConfig<E,
              MmaTile{.m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1}>;

namespace {

template <template <class> class Tile>
cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  return p.blocks.a ? launch_gemm_mma<Tile<E4m3Blocks>>(p, stream) : launch_gemm_mma<Tile<E4m3>>(p, stream);
}
template <template <class> class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_89, .tile_m = Tile<E4m3>::kM, .tile_n = Tile<E4m3>::kN, .launch = launch<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<Fp8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
