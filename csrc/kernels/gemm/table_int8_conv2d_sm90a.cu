// int8_conv2d on wgmma m64nNk32.
#include "device/epilogue/fragment.cuh"
#include "device/epilogue/fragment_transposed.cuh"
#include "kernels/gemm/window_tma.cuh"

namespace forwardpass {

// As int8_gemm's (table_int8_sm90a.cu). None is cut up along K by clusters: of few tiles those of 64 columns are
// chosen.
constexpr WgmmaTile k128x256{.m = 128, .n = 256, .stages = 4};
constexpr WgmmaTile k128x128{.m = 128, .n = 128, .stages = 6};
// Of 64 output channels, as early layers have them, 128 columns would be half of nothing.
constexpr WgmmaTile k128x64{.m = 128, .n = 64, .stages = 6};

namespace {

using Rows = WgmmaRows<GemmKind::int8_conv2d, Int8, WindowMainloop>;
const GemmKernel kernels[] = {Rows::row<k128x256, PersistentTiles, FragmentEpilogue>(1084),
                              Rows::row<k128x128, PersistentTiles, FragmentEpilogue>(656),
                              Rows::row<k128x64, PersistentTiles, FragmentEpilogue>(400)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
