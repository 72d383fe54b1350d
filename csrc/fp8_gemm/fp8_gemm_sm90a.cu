// fp8_gemm on wgmma m64n128k32 of e4m3, promoted to fp32 every 128 of K.
#include "common/gemm_sm90a.cuh"
#include "fp8_gemm/fp8_gemm.h"

namespace forwardpass {

using Tile128x256 = WgmmaConfig<E4m3, 128, 256, 1, 4>;
using Tile128x128 = WgmmaConfig<E4m3, 128, 128, 2, 6>;

int fp8_gemm_sm90a(const GemmParams& p, cudaStream_t stream) {
  return p.plan.tile_n == 256 ? launch_gemm_wgmma<Tile128x256>(p, stream) : launch_gemm_wgmma<Tile128x128>(p, stream);
}

}  // namespace forwardpass
