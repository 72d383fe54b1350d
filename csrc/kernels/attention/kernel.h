#pragma once
// What attention's kernels say about themselves: a row of the table that select.cpp selects from.
#include <cuda_runtime.h>

#include "kernels/registry.h"
#include "params/attention.h"
#include "params/attention_decode.h"

namespace forwardpass {

// What a kernel is compiled for. Tile sizes follow from it, by what shared memory and registers hold.
struct AttentionInstance {
  Dtype dtype;              // of q, k, v and out
  int head_dim, value_dim;  // columns of q and k, and of v; value_dim is at most head_dim. Fewer are zero-filled
  bool modified;            // with score modifiers: mask, ALiBi or softcap
  bool paged = false;       // on mma.sync: keys are a cache's, paged or contiguous, by seq_lens; without a mask
};

struct AttentionKernel {
  Arch arch;
  AttentionInstance instance;
  bool (*reads)(const AttentionParams& p);  // the keys from where they are
  cudaError_t (*launch)(const AttentionParams& p, cudaStream_t stream);
  int64_t (*workspace)(const AttentionParams& p) = nullptr;  // bytes that launch takes; null: none

  int64_t workspace_bytes(const AttentionParams& p) const { return workspace ? workspace(p) : 0; }
};

using AttentionKernels = Registered<AttentionParams, AttentionKernel>;

// The kernel for a call, of those that were built; null: none takes it.
const AttentionKernel* kernel_for(const AttentionParams& p);

// attention_decode of many rows as prefill of a cache, and the kernel that then takes less time than decode's; null:
// decode's takes less, or none takes the call.
AttentionParams prefill_of(const AttentionDecodeParams& p);
const AttentionKernel* prefill_kernel_for(const AttentionDecodeParams& p);

}  // namespace forwardpass
