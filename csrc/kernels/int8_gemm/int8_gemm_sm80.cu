// int8_gemm on mma.sync m16n8k32, and the choice between it, wgmma and the GEMV.
#include "device/gemm_sm80.cuh"
#include "params/int8_gemm.h"

namespace forwardpass {

// Three stages of 64: while one is used, 128 of K are on their way, 1024 clocks of a multiprocessor of an A100 with two
// blocks each, which covers the latency of its memory. 48 KB a block, so two fit the 100 KB of an L40S.
using Tile128x128 = MmaConfig<Int8, 128, 128, 2, 2, 64, 3, 2>;
using Tile64x128 = MmaConfig<Int8, 64, 128, 2, 2, 64, 3, 2>;
// Memory binds: 128 of K a stage, whole lines of the weight, and four stages, 54 KB on their way.
using Tile16x128 = MmaConfig<Int8, 16, 128, 1, 4, 128, 4, 1>;

cudaError_t int8_gemv(const GemmParams& p, cudaStream_t stream);
cudaError_t __attribute__((weak)) int8_gemm_sm90a(const GemmParams& p, cudaStream_t stream);

}  // namespace forwardpass

int forwardpass_int8_gemm(const forwardpass::Int8GemmParams* p, void* stream) {
  using namespace forwardpass;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p->plan.path == GemmPlan::Path::gemv) return int8_gemv(*p, s);
  if (p->plan.path == GemmPlan::Path::wgmma) return int8_gemm_sm90a(*p, s);
  switch (p->plan.tile_m) {
    case 16:
      return launch_gemm_mma<Tile16x128>(*p, s);
    case 64:
      return launch_gemm_mma<Tile64x128>(*p, s);
    default:
      return launch_gemm_mma<Tile128x128>(*p, s);
  }
}
