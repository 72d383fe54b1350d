// fp8 on wgmma m64nNk32 of e4m3, promoted to fp32 every 128 of K.
#include "device/epilogue/fragment.cuh"
#include "device/epilogue/fragment_transposed.cuh"
#include "kernels/gemm/wgmma_mainloops.cuh"

namespace forwardpass {

// Main loop: a consumer warp issues 416 instructions for 2^20 multiply-adds (208 for eight m64n128k32, 128 of them the
// promotion), 492 with the smaller tile. Registers: 128 accumulators, 64 partial ones, 16 of a. The 256 columns of a
// warpgroup are two groups of fp8_gemm_quantize or, of a gated product, one. Shared memory: 80 KB read and 48 KB
// written a stage, in the tensor cores' 1024 clocks; with a in shared memory, or 128 x 128 a warpgroup, 96 KB were read
// (1303 clocks a stage, modelled; 1159 now).
constexpr WgmmaTile k128x256{.m = 128, .n = 256, .stages = 4};
// Grouped in three stages, as four leave no room for the list of experts. Modelled on an H100, 4096 rows of 2 experts
// by 4096 x 4096: scales of rows 90.0 us, as one product in four stages 89.3, of blocks 88.1 and 88.6.
constexpr WgmmaTile k128x256Grouped{.m = 128, .n = 256, .stages = 3};
constexpr WgmmaTile k128x128{.m = 128, .n = 128, .stages = 6};
// Between them, for products whose last round of the others leaves multiprocessors idle. With 96 accumulators and as
// many partial ones a warpgroup has all columns, so that wgmma reads 64 KB per stage of 40: 139 bytes a clock for 144.
constexpr WgmmaTile k128x192{.m = 128, .n = 192, .stages = 4};
// Few rows, as for int8.
constexpr WgmmaTile k64x128{.m = 64, .n = 128, .stages = 8}, k16x128{.m = 16, .n = 128, .stages = 8};

namespace {

using Rows = WgmmaRows<GemmKind::fp8, E4m3OptionalBlocks, PromotingMainloop>;
const GemmKernel kernels[] = {Rows::row<k128x256, PersistentTiles, QuantizingEpilogue>(1163),
                              Rows::row<k128x192, PersistentTiles, FragmentEpilogue>(893),
                              Rows::row<k128x128, ClusterTiles, QuantizingEpilogue>(689),
                              Rows::row<k64x128, ClusterTiles, CachedEpilogue>(),
                              Rows::row<k16x128, ClusterTiles, CachedEpilogue>(),
                              Rows::grouped<k128x256Grouped, 384, FragmentEpilogue>(1163),
                              Rows::grouped<k128x128, 512, FragmentEpilogue>(689),
                              Rows::grouped<k64x128, 512, CachedEpilogue>(),
                              Rows::grouped<k16x128, 512, CachedEpilogue>()};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
