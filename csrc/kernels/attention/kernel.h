#pragma once
// What attention's kernels say about themselves: a row of the table that select.cpp selects from.
#include <cuda_runtime.h>

#include "kernels/registry.h"
#include "params/attention.h"

namespace forwardpass {

// What a kernel is compiled for. Tile sizes follow from it, by what shared memory and registers hold.
struct AttentionInstance {
  Dtype dtype;              // of q, k, v and out
  int head_dim, value_dim;  // columns of q and k, and of v; value_dim is at most head_dim. Fewer are zero-filled
  bool modified;            // with score modifiers: mask, ALiBi or softcap
};

struct AttentionKernel {
  Arch arch;
  AttentionInstance instance;
  cudaError_t (*launch)(const AttentionParams& p, cudaStream_t stream);
};

using AttentionKernels = Registered<AttentionParams, AttentionKernel>;

}  // namespace forwardpass
