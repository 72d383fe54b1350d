// attention_decode's entry points, and the Configs that there are of the kernel for few rows. Many rows (chunked
// prefill) go to attention's kernels, except 8-bit caches.
#include "kernels/attention/decode.cuh"
#include "kernels/attention/kernel.h"

namespace forwardpass {
namespace {

template <class F>
cudaError_t with_config(const AttentionDecodeParams& p, F f) {
  return dispatch<Dtype::f16, Dtype::bf16, Dtype::i8, Dtype::e4m3>(p.cache.dtype, [&](auto C) {
    // One for 64 would save instructions, which do not bind; bytes beyond the head dim are not read.
    const bool narrow = p.cache.head_dim <= 128 && p.cache.value_dim <= 128;
    return narrow ? f(DecodeConfig<C(), 128>()) : f(DecodeConfig<C(), 256>());
  });
}

}  // namespace
}  // namespace forwardpass

using namespace forwardpass;

int64_t forwardpass_attention_decode_workspace(const AttentionDecodeParams* p) {
  if (const AttentionKernel* prefill = prefill_kernel_for(*p)) return prefill->workspace_bytes(prefill_of(*p));
  int64_t bytes = 0;
  (void)with_config(*p, [&](auto config) {
    using Config = decltype(config);
    bytes = grid_of<Config>(*p) * (p->batch_invariant ? 1 : 2) *
            PartialResult::floats(decode_partial_rows(*p), p->cache.value_dim) * sizeof(float);
    return cudaSuccess;
  });
  return bytes;
}
int forwardpass_attention_decode(const AttentionDecodeParams* p, void* stream) {
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  if (const AttentionKernel* prefill = prefill_kernel_for(*p)) return prefill->launch(prefill_of(*p), cuda_stream);
  return with_config(*p, [&](auto config) { return launch_decode<decltype(config)>(*p, cuda_stream); });
}
