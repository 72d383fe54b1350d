// w8a16_grouped_gemm on mma.sync: w8a16_gemm's tiles of 16 and of 64 rows.
//
// Memory binds. Of one token and eight experts of 2048 x 2048, 33.6 MB, an H100's takes 10.0 us; x and the output are
// 64 KB. Each of 128 tiles reads 256 KB of the weight, which no other does, and 16 rows of x, 64 KB, from L2. For the
// 1150 clocks that a stage's 16 KB take, a warp issues 440 instructions (int8 to bf16), and is alone on its scheduler.
//
// Modelled on an H100, out of what its memory could give: one token 0.69 (14.6 us, of which 3 are the list of experts,
// the first bytes, the last stage and the epilogue; the GEMV takes 15.1 us for as many bytes of one product), of 1024
// columns of K 0.58; 4 tokens and 64 experts 0.79, 16 and 64 tokens 0.84. 256 tokens take 131 us, in tiles of 16 rows
// 177; 512 take 200 and 310. One token of an L40S 0.80, of an A100 0.65, and of e4m3 0.46, where it is upconverted
// without an instruction for it and issue binds; 64 tokens 0.84 of either weight. Without gain: 16 x 64 in warps of 16
// columns (one token 14.4 us, four 43.6 in place of 39.5), eight such warps for 128 columns (14.8 and 49.9), and scales
// that are prefetched (14.6 and 39.2).
#include "device/w8a16_sm80.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_grouped_gemm.h"

namespace forwardpass {

using Tile16x128 = W8a16Config<Grouped<W8a16>, W8a16Tile{.m = 16, .n = 128, .stages = 4, .blocks_per_sm = 1}>;
using Tile64x128 = W8a16Config<Grouped<W8a16>, W8a16Tile{.m = 64, .n = 128, .stages = 3, .blocks_per_sm = 1}>;

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
// As many blocks as an A100's multiprocessor holds of 16 rows, and an H100's of either; where fewer fit, the others
// begin when those have ended.
const GemmKernel kernels[] = {row<Tile64x128>(2), row<Tile16x128>(2)};
const GemmKernels<W8a16GroupedGemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
