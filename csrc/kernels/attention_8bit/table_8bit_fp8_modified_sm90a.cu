// attention_8bit on wgmma with score modifiers: mask, ALiBi or softcap; v and probabilities in e4m3. It
// computes 64 columns as 128, and 256 without modifiers too: kernels of their own would be .23 MB.
#include "kernels/attention/int8_wgmma.cuh"

namespace forwardpass {
namespace {

template <int kDim>
constexpr AttentionKernel modified = int8_wgmma_attention<AttentionInstance{
    .dtype = Dtype::e4m3, .head_dim = kDim, .value_dim = kDim, .modified = true}>;

const AttentionKernel kernels[] = {modified<128>, modified<256>};
const Attention8bitKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
