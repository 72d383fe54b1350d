// w8a16_gemm of up to four rows. A file of its own, as it is built for 9.0, which uses wgmma for more rows.
#include "device/dispatch.h"
#include "device/gemv_sm80.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

namespace {

cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) { return launch_gemv<X()>(p, stream); });
}

const GemmKernel kernels[] = {gemv(sm_80, launch)};
const GemmKernels<W8a16GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
