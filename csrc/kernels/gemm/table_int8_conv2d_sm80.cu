// int8_conv2d on mma.sync m16n8k32.
#include "device/epilogue/fragment.cuh"
#include "kernels/gemm/window_copy.cuh"

namespace forwardpass {

// As int8_gemm's (table_int8_sm80.cu).
constexpr MmaTile k128x128{
    .m = 128, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2};
constexpr MmaTile k64x128{
    .m = 64, .n = 128, .warps_m = 2, .warps_n = 2, .stage_k = 64, .stages = 3, .blocks_per_sm = 2};
// Of 64 output channels, as early layers have them, 128 columns would be half of nothing.
constexpr MmaTile k128x64{
    .m = 128, .n = 64, .warps_m = 4, .warps_n = 1, .stage_k = 64, .stages = 3, .blocks_per_sm = 2};

namespace {

using Rows = MmaRows<GemmKind::int8_conv2d, Int8, WindowMainloop, FragmentEpilogue>;
const GemmKernel kernels[] = {Rows::one<k128x128>(sm_80), Rows::one<k64x128>(sm_80), Rows::one<k128x64>(sm_80)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
