// attention_8bit on mma.sync with score modifiers (mask, ALiBi or softcap): v and probabilities in e4m3.
#include "kernels/attention/int8.cuh"

namespace forwardpass {
namespace {

template <int kDim>
constexpr AttentionKernel modified =
    int8_attention<AttentionInstance{.dtype = Dtype::e4m3, .head_dim = kDim, .value_dim = kDim, .modified = true}>;

const AttentionKernel kernels[] = {modified<64>, modified<128>, modified<256>};
const Attention8bitKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
