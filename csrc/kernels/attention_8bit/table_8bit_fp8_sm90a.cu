// attention_8bit on wgmma without score modifiers; v and probabilities in e4m3. 256 columns
// are in the table with them.
#include "kernels/attention/int8_wgmma.cuh"

namespace forwardpass {
namespace {

template <int kDim>
constexpr AttentionKernel plain = int8_wgmma_attention<AttentionInstance{
    .dtype = Dtype::e4m3, .head_dim = kDim, .value_dim = kDim, .modified = false}>;

const AttentionKernel kernels[] = {plain<64>, plain<128>};
const Attention8bitKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
