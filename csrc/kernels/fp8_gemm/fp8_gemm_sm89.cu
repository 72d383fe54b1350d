// fp8_gemm on mma.sync m16n8k32 of e4m3, promoted to fp32 every 128 of K; up to four rows by the GEMV.
#include "device/gemm_sm80.cuh"
#include "params/fp8_gemm.h"

namespace forwardpass {

// Three stages of 128, 98 of the 99 KB that a block of an L40S may have: while one is used, for 2048 clocks, two are on
// their way. A warp's 64 x 32 leaves room for as many partial sums; 64 x 48 and 64 x 64 spilled, 64 and 1196 bytes.
// Bytes from L2: 16 a clock of a multiprocessor, which gets about 14 of an L40S (5 TB/s for 142 at 2.5 GHz, published):
// there 128 x 128 is bound by L2, at 7/8 of the peak.
template <class E>
using Tile128x128 = MmaConfig<E, 128, 128, 2, 4, 128, 3, 1>;
template <class E>
using Tile64x128 = MmaConfig<E, 64, 128, 1, 4, 128, 3, 1>;
// Memory binds: four stages, 54 KB on their way.
template <class E>
using Tile16x128 = MmaConfig<E, 16, 128, 1, 4, 128, 4, 1>;

template <class E>
cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  switch (p.plan.tile_m) {
    case 16:
      return launch_gemm_mma<Tile16x128<E>>(p, stream);
    case 64:
      return launch_gemm_mma<Tile64x128<E>>(p, stream);
    default:
      return launch_gemm_mma<Tile128x128<E>>(p, stream);
  }
}

cudaError_t fp8_gemv(const GemmParams& p, cudaStream_t stream);
cudaError_t __attribute__((weak)) fp8_gemm_sm90a(const GemmParams& p, cudaStream_t stream);

}  // namespace forwardpass

int forwardpass_fp8_gemm(const forwardpass::Fp8GemmParams* p, void* stream) {
  using namespace forwardpass;
  const auto s = static_cast<cudaStream_t>(stream);
  if (p->plan.path == GemmPlan::Path::gemv) return fp8_gemv(*p, s);
  if (p->plan.path == GemmPlan::Path::wgmma) return fp8_gemm_sm90a(*p, s);
  return p->blocks.a ? launch<E4m3Blocks>(*p, s) : launch<E4m3>(*p, s);
}
