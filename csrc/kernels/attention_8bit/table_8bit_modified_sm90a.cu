// attention_8bit on wgmma with score modifiers: mask, ALiBi or softcap.
#include "kernels/attention/int8_wgmma.cuh"

namespace forwardpass {
namespace {

template <int kDim>
constexpr AttentionKernel modified =
    int8_wgmma_attention<AttentionInstance{.dtype = Dtype::i8, .head_dim = kDim, .value_dim = kDim, .modified = true}>;

const AttentionKernel kernels[] = {modified<64>, modified<128>, modified<256>};
const Attention8bitKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
