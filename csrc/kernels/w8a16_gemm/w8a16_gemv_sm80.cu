// w8a16_gemm of up to four rows. Apart from the larger products, as 9.0 runs this one and has wgmma for them.
#include "device/dispatch.h"
#include "device/gemv_sm80.cuh"

namespace forwardpass {

cudaError_t w8a16_gemv(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) { return launch_gemv<X()>(p, stream); });
}

}  // namespace forwardpass
