// attention_8bit on mma.sync without score modifiers: v and probabilities in e4m3.
#include "kernels/attention/int8.cuh"

namespace forwardpass {
namespace {

template <int kDim>
constexpr AttentionKernel plain =
    int8_attention<AttentionInstance{.dtype = Dtype::e4m3, .head_dim = kDim, .value_dim = kDim, .modified = false}>;

const AttentionKernel kernels[] = {plain<64>, plain<128>, plain<256>};
const Attention8bitKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
