// attention_8bit on wgmma without score modifiers.
#include "kernels/attention/int8_wgmma.cuh"

namespace forwardpass {
namespace {

template <int kDim>
constexpr AttentionKernel plain =
    int8_wgmma_attention<AttentionInstance{.dtype = Dtype::i8, .head_dim = kDim, .value_dim = kDim, .modified = false}>;

const AttentionKernel kernels[] = {plain<64>, plain<128>, plain<256>};
const Attention8bitKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
