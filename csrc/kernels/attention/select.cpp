// attention's entry point: of the kernels that take the call, one of the newest architecture, with the fewest columns.
#include "kernels/attention/kernel.h"

namespace forwardpass {
namespace {

bool takes(const AttentionKernel& k, const AttentionParams& p) {
  const bool modified = p.softcap > 0 || p.alibi_slopes || p.mask.kind != AttentionMaskKind::none;
  return runs_on(k.arch, p.device) && k.instance.dtype == p.dtype && k.instance.modified == modified &&
         k.instance.head_dim >= p.head_dim && k.instance.value_dim >= p.value_dim;
}
bool better(const AttentionKernel& a, const AttentionKernel& b) {
  const auto columns = [](const AttentionInstance& i) { return i.head_dim + i.value_dim; };
  return a.arch.number != b.arch.number ? a.arch.number > b.arch.number : columns(a.instance) < columns(b.instance);
}

}  // namespace
}  // namespace forwardpass

int forwardpass_attention(const forwardpass::AttentionParams* p, void* stream) {
  using namespace forwardpass;
  const AttentionKernel* best = nullptr;
  AttentionKernels::for_each([&](const AttentionKernel& k) {
    if (takes(k, *p) && (!best || better(k, *best))) best = &k;
  });
  return best ? best->launch(*p, static_cast<cudaStream_t>(stream)) : cudaErrorNoKernelImageForDevice;
}
