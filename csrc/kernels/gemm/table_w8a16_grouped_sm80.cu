// w8a16 on mma.sync, grouped: on every architecture. (In a file of its own, as 9.0 needs machine code of it, and none
// of table_w8a16_sm80.cu.)
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
#include "device/epilogue/fragment_transposed.cuh"
#include "kernels/gemm/mma_upconverting.cuh"

namespace forwardpass {
namespace {

// As many blocks as an A100's multiprocessor holds of 16 rows, and an H100's of either; where fewer fit, the others
// begin when those have ended.
constexpr int kBlocksPerSm = 2;

using Rows = MmaRows<GemmKind::w8a16, W8a16, UpconvertingMmaMainloop, TransposedEpilogue>;
// With the list of 480 a block of 64 x 128 fits the 99 KB of an L40S.
const GemmKernel kernels[] = {Rows::grouped<kW8a16Of64Rows, 480>(sm_80, kBlocksPerSm),
                              Rows::grouped<kW8a16Of16Rows, 512>(sm_80, kBlocksPerSm)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
