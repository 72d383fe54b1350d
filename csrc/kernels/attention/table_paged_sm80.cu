// attention on mma.sync of a cache, without score modifiers: attention_decode's many rows (chunked prefill). Other head
// dims run in the next. From 129 columns on that is the kernel with score modifiers, which takes 2 to 5 % longer
// (modelled on an A100); a kernel of its own is a third of this file.
#include "kernels/attention/mma.cuh"

namespace forwardpass {
namespace {

template <Dtype kDtype, int kDim>
constexpr AttentionKernel paged = mma_attention<AttentionInstance{
    .dtype = kDtype, .head_dim = kDim, .value_dim = kDim, .modified = false, .paged = true}>;

const AttentionKernel kernels[] = {paged<Dtype::f16, 64>, paged<Dtype::f16, 128>, paged<Dtype::bf16, 64>,
                                   paged<Dtype::bf16, 128>};
const AttentionKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
