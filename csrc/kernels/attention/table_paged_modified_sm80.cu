// attention on mma.sync of a cache, with ALiBi or softcap. Head dim 64 runs in 128.
#include "kernels/attention/mma.cuh"

namespace forwardpass {
namespace {

template <Dtype kDtype, int kDim>
constexpr AttentionKernel paged = mma_attention<AttentionInstance{
    .dtype = kDtype, .head_dim = kDim, .value_dim = kDim, .modified = true, .paged = true}>;

const AttentionKernel kernels[] = {paged<Dtype::f16, 128>, paged<Dtype::f16, 256>, paged<Dtype::bf16, 128>,
                                   paged<Dtype::bf16, 256>};
const AttentionKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
