// attention on wgmma without score modifiers.
#include "kernels/attention/wgmma.cuh"

namespace forwardpass {
namespace {

template <Dtype kDtype, int kHeadDim, int kValueDim = kHeadDim>
constexpr AttentionKernel plain = wgmma_attention<AttentionInstance{
    .dtype = kDtype, .head_dim = kHeadDim, .value_dim = kValueDim, .modified = false}>;

const AttentionKernel kernels[] = {plain<Dtype::f16, 64>,        plain<Dtype::f16, 96>,   plain<Dtype::f16, 128>,
                                   plain<Dtype::f16, 192, 128>,  plain<Dtype::f16, 192>,  plain<Dtype::f16, 256>,
                                   plain<Dtype::bf16, 64>,       plain<Dtype::bf16, 96>,  plain<Dtype::bf16, 128>,
                                   plain<Dtype::bf16, 192, 128>, plain<Dtype::bf16, 192>, plain<Dtype::bf16, 256>};
const AttentionKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
