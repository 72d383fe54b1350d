// int8_gemm of up to four rows. Apart from the larger products, as 9.0 runs this one and has wgmma for them.
#include "device/gemv_sm80.cuh"
#include "kernels/gemm.h"
#include "params/int8_gemm.h"

namespace forwardpass {

const GemmKernel kernels[] = {gemv(sm_80, launch_gemv<Dtype::i8>)};
const GemmKernels<Int8GemmParams> registered(kernels);

}  // namespace forwardpass
