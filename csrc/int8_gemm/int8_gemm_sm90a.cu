// int8_gemm on wgmma m64n256k32 and m64n128k32.
#include "common/gemm_sm90a.cuh"
#include "int8_gemm/int8_gemm.h"

namespace forwardpass {

using Tile128x256 = WgmmaConfig<Int8, 128, 256, 2, 4>;
using Tile128x128 = WgmmaConfig<Int8, 128, 128, 2, 6>;

int int8_gemm_sm90a(const GemmParams& p, cudaStream_t stream) {
  return p.plan.tile_n == 256 ? launch_gemm_wgmma<Tile128x256>(p, stream) : launch_gemm_wgmma<Tile128x128>(p, stream);
}

}  // namespace forwardpass
