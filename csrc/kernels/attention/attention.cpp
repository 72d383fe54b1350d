// attention's entry point: the kernels of the newest architecture that the device runs.
#include "kernels/attention/attention_kernel.h"

int forwardpass_attention(const forwardpass::AttentionParams* p, void* stream) {
  using namespace forwardpass;
  const AttentionKernel* newest = nullptr;
  AttentionKernels::for_each([&](const AttentionKernel& k) {
    if (runs_on(k.arch, p->device) && (!newest || k.arch.number > newest->arch.number)) newest = &k;
  });
  return newest ? newest->launch(*p, static_cast<cudaStream_t>(stream)) : cudaErrorNoKernelImageForDevice;
}
