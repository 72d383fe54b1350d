// fp8_gemm of up to four rows. A file of its own, as it is built for 9.0, which uses wgmma for more rows.
#include "device/gemv_sm80.cuh"
#include "kernels/gemm.h"
#include "params/fp8_gemm.h"

namespace forwardpass {

namespace {

const GemmKernel kernels[] = {gemv(sm_89, launch_gemv<Dtype::e4m3>)};
const GemmKernels<Fp8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
