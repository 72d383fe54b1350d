// int8_gemm of up to four rows. A file of its own, as it is built for 9.0, which uses wgmma for more rows.
#include "device/gemv_sm80.cuh"
#include "kernels/gemm.h"
#include "params/int8_gemm.h"

namespace forwardpass {

namespace {

const GemmKernel kernels[] = {gemv(sm_80, launch_gemv<Dtype::i8>)};
const GemmKernels<Int8GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
