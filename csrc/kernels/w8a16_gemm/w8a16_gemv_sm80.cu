// w8a16_gemm of up to four rows. Apart from the larger products, as 9.0 runs this one and has wgmma for them.
#include "device/dispatch.h"
#include "device/gemv_sm80.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) { return launch_gemv<X()>(p, stream); });
}

const GemmKernel kernels[] = {gemv(sm_80, launch)};
const GemmKernels<W8a16GemmParams> registered(kernels);

}  // namespace forwardpass
