// w8a16 on wgmma m64nNk16: the tile's rows are the output's columns, and a cluster shares the rows of x.
#include "device/dispatch.h"
#include "device/epilogue/fragment_swapped.cuh"
#include "kernels/gemm/wgmma_upconverting.cuh"

namespace forwardpass {

// Memory binds: 112 KB of the weight are in flight.
constexpr WgmmaTile k128x16{.m = 128, .n = 16, .stages = 8}, k128x64{.m = 128, .n = 64, .stages = 6};
// 144 KB are in flight while one stage is used. In clusters of two a block reads 32 bytes a clock from L2, of about 39
// that are available.
constexpr WgmmaTile k128x128{.m = 128, .n = 128, .stages = 4};
// Shared memory has room for five stages of 64 of K, of which four, 160 KB, are in flight; two of 128 would be all. In
// clusters of two a block reads 24 bytes a clock from L2.
constexpr WgmmaTile k128x256{.m = 128, .n = 256, .stages = 5, .stage_k = 64};

namespace {

template <Dtype X, WgmmaTile kTile, bool kBlockScaled, template <class> class Schedule, template <class> class Epilogue>
using Config = WgmmaConfig<Upconverted<X, kBlockScaled>, kTile, Schedule, UpconvertingMainloop, Epilogue>;

template <WgmmaTile kTile, bool kBlockScaled, template <class> class Schedule, template <class> class Epilogue>
cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) {
    return launch_gemm_wgmma<Config<X(), kTile, kBlockScaled, Schedule, Epilogue>>(p, stream);
  });
}
template <WgmmaTile kTile, template <class> class Schedule, template <class> class Epilogue>
constexpr GemmKernel row(cudaError_t (*launcher)(const GemmParams&, cudaStream_t)) {
  GemmKernel row = wgmma_row<Config<Dtype::f16, kTile, kTile.n != 256, Schedule, Epilogue>>(GemmKind::w8a16);
  row.launch = launcher;
  return row;
}
template <WgmmaTile kTile, template <class> class Epilogue>
constexpr GemmKernel row() {
  return row<kTile, ClusterTiles, Epilogue>(launch<kTile, true, ClusterTiles, Epilogue>);
}
cudaError_t launch_128x256(const GemmParams& p, cudaStream_t stream) {
  return p.blocks.b ? launch<k128x256, true, PersistentTiles, SwappedEpilogue>(p, stream)
                    : launch<k128x256, false, PersistentTiles, SwappedEpilogue>(p, stream);
}
const GemmKernel kernels[] = {
    row<k128x256, PersistentTiles, SwappedEpilogue>(launch_128x256),
    row<k128x128, PersistentTiles, SwappedEpilogue>(launch<k128x128, true, PersistentTiles, SwappedEpilogue>),
    row<k128x64, SwappedEpilogue>(), row<k128x16, CachedEpilogue>()};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
