// int8_gemm of up to four rows. Apart from the larger products, as 9.0 runs this one and has wgmma for them.
#include "device/gemv_sm80.cuh"

namespace forwardpass {

cudaError_t int8_gemv(const GemmParams& p, cudaStream_t stream) { return launch_gemv<Dtype::i8>(p, stream); }

}  // namespace forwardpass
