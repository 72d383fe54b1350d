// int8 on mma.sync m16n8k32.
#include "device/epilogue/fragment.cuh"
#include "kernels/gemm/mma_mainloop.cuh"

namespace forwardpass {

// Three stages of 64: while one is used, 128 of K are in flight, which last 1024 clocks of an A100's multiprocessor
// with two blocks each and cover its memory latency. 48 KB per block, so that two fit the 100 KB of an L40S, with the
// list of 144 experts too.
constexpr MmaTile k128x128{
    .m = 128, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2};
constexpr MmaTile k64x128{
    .m = 64, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2};
// Memory binds: 128 of K per stage, whole cache lines of the weight, and four stages, 54 KB in flight.
constexpr MmaTile k16x128{
    .m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1};

namespace {

using Rows = MmaRows<GemmKind::int8, Int8, MmaMainloop, FragmentEpilogue>;
// Grouped, two blocks of 16 rows fit an A100's multiprocessor; an L40S has the second ones when the first have ended.
const GemmKernel kernels[] = {Rows::one<k128x128>(sm_80),         Rows::one<k64x128>(sm_80),
                              Rows::one<k16x128>(sm_80),          Rows::grouped<k128x128, 144>(sm_80),
                              Rows::grouped<k64x128, 512>(sm_80), Rows::grouped<k16x128, 512>(sm_80, 2)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
