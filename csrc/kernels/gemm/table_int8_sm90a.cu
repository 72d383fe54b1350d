// int8 on wgmma m64nNk32.
#include "device/epilogue/fragment.cuh"
#include "device/epilogue/fragment_transposed.cuh"
#include "kernels/gemm/wgmma_mainloops.cuh"

namespace forwardpass {

// Main loop: a consumer warp issues 86 instructions for 2^20 multiply-adds (43 for four m64n256k32), 168 with the
// smaller tile. 168 registers at launch. A stage of 48 KB is used for 1024 clocks, if the tensor cores bind, while
// three more, 144 KB, are in flight. From L2 it takes 32 bytes a clock in clusters of two; an H100's multiprocessor is
// assumed to get 39. Shared memory: 48 KB written and 80 KB read by wgmma in 1024 clocks, all of its 128 bytes a clock.
constexpr WgmmaTile k128x256{.m = 128, .n = 256, .stages = 4};
// Twice as many tiles, for small products. L2 binds, at 48 bytes a clock in clusters: modelled, 512 x 4096 x 4096 takes
// 11.3 us; bound by the tensor cores it would take 8.9.
constexpr WgmmaTile k128x128{.m = 128, .n = 128, .stages = 6};
// Between them, for products whose last round of the others leaves multiprocessors idle: 40 KB a stage, 768 clocks.
constexpr WgmmaTile k128x192{.m = 128, .n = 192, .stages = 4};
// Few rows, which are the n16 or n64 of a wgmma: 16 KB of the weight per stage, of which an H100's multiprocessor needs
// 15 KB in flight (gemv_sm80.cu).
constexpr WgmmaTile k64x128{.m = 64, .n = 128, .stages = 8}, k16x128{.m = 16, .n = 128, .stages = 8};

namespace {

using Rows = WgmmaRows<GemmKind::int8, Int8, ExactMainloop>;
// A grouped tile of 128 x 256 leaves room for the list of 384 experts.
const GemmKernel kernels[] = {Rows::row<k128x256, PersistentTiles, QuantizingEpilogue>(1084),
                              Rows::row<k128x192, PersistentTiles, FragmentEpilogue>(860),
                              Rows::row<k128x128, ClusterTiles, FragmentEpilogue>(656),
                              Rows::row<k64x128, ClusterTiles, CachedEpilogue>(),
                              Rows::row<k16x128, ClusterTiles, CachedEpilogue>(),
                              Rows::grouped<k128x256, 384, FragmentEpilogue>(1084),
                              Rows::grouped<k128x128, 512, FragmentEpilogue>(656),
                              Rows::grouped<k64x128, 512, CachedEpilogue>(),
                              Rows::grouped<k16x128, 512, CachedEpilogue>()};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
