// attention_decode's entry points, and the Configs that there are.
#include "kernels/attention/decode.cuh"

namespace forwardpass {
namespace {

template <class F>
cudaError_t with_config(const AttentionDecodeParams& p, F f) {
  return dispatch<Dtype::f16, Dtype::bf16, Dtype::i8, Dtype::e4m3>(p.cache.dtype, [&](auto C) {
    // One for 64 would save instructions, which do not bind; bytes beyond the head dim are not read.
    return p.cache.head_dim <= 128 ? f(DecodeConfig<C(), 128>()) : f(DecodeConfig<C(), 256>());
  });
}

}  // namespace
}  // namespace forwardpass

using namespace forwardpass;

int64_t forwardpass_attention_decode_workspace(const AttentionDecodeParams* p) {
  int64_t bytes = 0;
  (void)with_config(*p, [&](auto config) {
    using Config = decltype(config);
    bytes = grid_of<Config>(*p) * (p->batch_invariant ? 1 : 2) * PartialResult::floats(*p) * sizeof(float);
    return cudaSuccess;
  });
  return bytes;
}
int forwardpass_attention_decode(const AttentionDecodeParams* p, void* stream) {
  return with_config(
      *p, [&](auto config) { return launch_decode<decltype(config)>(*p, static_cast<cudaStream_t>(stream)); });
}
