// attention_decode's entry points, and the Configs that there are of the kernel for few rows. Many rows (chunked
// prefill) go to attention's kernels, except 8-bit caches.
#include "kernels/attention/decode.cuh"
#include "kernels/attention/kernel.h"

using namespace forwardpass;

int forwardpass_select_attention_decode(const AttentionDecodeParams* p, AttentionDecodeChoice* choice) {
  if (choose_prefill(*p, *choice)) return cudaSuccess;
  return dispatch<Dtype::f16, Dtype::bf16, Dtype::i8, Dtype::e4m3>(p->cache.dtype, [&](auto C) {
    // One for 64 would save instructions, which do not bind; bytes beyond the head dim are not read.
    const bool narrow = p->cache.head_dim <= 128 && p->cache.value_dim <= 128;
    *choice = narrow ? choose_decode<DecodeConfig<C(), 128>>(*p) : choose_decode<DecodeConfig<C(), 256>>(*p);
    return cudaSuccess;
  });
}
int forwardpass_attention_decode(const AttentionDecodeParams* p, void* stream) { return p->choice.launch(*p, stream); }
