// w8a16 on mma.sync, one product.
#include "device/epilogue/fragment_transposed.cuh"
#include "kernels/gemm/mma_upconverting.cuh"

namespace forwardpass {

// Two stages are 96 KB, all that an L40S has: one is used, for 2048 clocks of an A100, while the other arrives. Two
// sets of accumulators are 128 registers, so eight warps per multiprocessor.
constexpr MmaTile kOf128Rows{
    .m = 128, .n = 128, .warps_m = 2, .warps_n = 4, .stage_k = 128, .stages = 2, .blocks_per_sm = 1};

namespace {

using Rows = MmaRows<GemmKind::w8a16, W8a16, UpconvertingMmaMainloop, TransposedEpilogue>;
const GemmKernel kernels[] = {Rows::one<kOf128Rows>(sm_80), Rows::one<kW8a16Of64Rows>(sm_80),
                              Rows::one<kW8a16Of16Rows>(sm_80)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
