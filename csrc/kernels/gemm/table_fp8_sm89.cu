// fp8 on mma.sync m16n8k32 of e4m3, promoted to fp32 every 128 of K.
#include "device/epilogue/fragment.cuh"
#include "kernels/gemm/mma_mainloop.cuh"

namespace forwardpass {

// Three stages of 128, 98 of the 99 KB that a block may have on an L40S: while one is used, for 2048 clocks, two are in
// flight. A warp's 64 x 32 leaves room for as many partial accumulators; 64 x 48 and 64 x 64 spilled 64 and 1196 bytes.
// L2: 16 bytes a clock for a multiprocessor, which gets about 14 on an L40S (5 TB/s for 142 at 2.5 GHz, published):
// there L2 binds 128 x 128, at 7/8 of the peak.
constexpr MmaTile k128x128{
    .m = 128, .n = 128, .warps_m = 2, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1};
constexpr MmaTile k64x128{
    .m = 64, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1};
// Memory binds: four stages, 54 KB in flight.
constexpr MmaTile k16x128{
    .m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1};

namespace {

template <class Element, MmaTile kTile>
using One = MmaConfig<Element, kTile, OneTile, MmaMainloop, FragmentEpilogue>;

template <MmaTile kTile>
cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  return p.blocks.a ? launch_gemm_mma<One<E4m3Blocks, kTile>>(p, stream) : launch_gemm_mma<One<E4m3, kTile>>(p, stream);
}
template <MmaTile kTile>
constexpr GemmKernel one() {
  GemmKernel row = mma_row<One<E4m3, kTile>>(GemmKind::fp8, sm_89);
  row.launch = launch<kTile>;
  return row;
}
// Grouped, one kernel has scales of either kind. That costs issue slots, of which enough are left: 853 instructions for
// 2^20 multiply-adds, which take the tensor cores of an L40S's multiprocessor 1024 clocks; they are issued in 213.
using Grouped = MmaRows<GemmKind::fp8, E4m3OptionalBlocks, MmaMainloop, FragmentEpilogue>;
// The grouped 64 x 128 is the largest that has room for the list of more than 144 experts.
const GemmKernel kernels[] = {one<k128x128>(),
                              one<k64x128>(),
                              one<k16x128>(),
                              Grouped::grouped<k128x128, 144>(sm_89),
                              Grouped::grouped<k64x128, 512>(sm_89),
                              Grouped::grouped<k16x128, 512>(sm_89)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
