// int8 on mma.sync m16n8k32.
#include "device/epilogue/fragment.cuh"
#include "kernels/gemm/mma_mainloop.cuh"
#include "schedule/grouped_tile.cuh"

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

template <MmaTile kTile>
constexpr GemmKernel one() {
  return mma_row<MmaConfig<Int8, kTile, OneTile, MmaMainloop, FragmentEpilogue>>(GemmKind::int8, sm_80);
}
template <MmaTile kTile, int kExperts>
constexpr GemmKernel grouped(int blocks_per_sm = kTile.blocks_per_sm) {
  constexpr MmaTile kWithList = with_experts(kTile, kExperts);
  return mma_row<MmaConfig<Int8, kWithList, GroupedTiles, MmaMainloop, FragmentEpilogue>>(GemmKind::int8, sm_80,
                                                                                          blocks_per_sm);
}
// Grouped, two blocks of 16 rows fit an A100's multiprocessor; an L40S has the second ones when the first have ended.
const GemmKernel kernels[] = {one<k128x128>(),          one<k64x128>(),          one<k16x128>(),
                              grouped<k128x128, 144>(), grouped<k64x128, 512>(), grouped<k16x128, 512>(2)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
