// attention on wgmma with score modifiers: mask, ALiBi or softcap. These kernels are twice as large as those without,
// so head dims 96, 192 and 192 with 128 of v have none of their own: they run in the next.
#include "kernels/attention/wgmma.cuh"

namespace forwardpass {
namespace {

template <Dtype kDtype, int kDim>
constexpr AttentionKernel modified =
    wgmma_attention<AttentionInstance{.dtype = kDtype, .head_dim = kDim, .value_dim = kDim, .modified = true}>;

const AttentionKernel kernels[] = {modified<Dtype::f16, 64>,  modified<Dtype::f16, 128>,  modified<Dtype::f16, 256>,
                                   modified<Dtype::bf16, 64>, modified<Dtype::bf16, 128>, modified<Dtype::bf16, 256>};
const AttentionKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
