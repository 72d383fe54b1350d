#pragma once
// What attention's kernels say about themselves: a row of the table that select.cpp selects from.
#include <cuda_runtime.h>

#include "kernels/registry.h"
#include "params/attention.h"
#include "params/attention_8bit.h"
#include "params/attention_decode.h"

namespace forwardpass {

// What a kernel is compiled for. Tile sizes follow from it, by what shared memory and registers hold.
struct AttentionInstance {
  Dtype dtype;  // of q, k, v and out; i8 and e4m3: of v, q and k are int8, and out is of 16 bits, of the call's dtype
  int head_dim, value_dim;  // columns of q and k, and of v; value_dim is at most head_dim. Fewer are zero-filled
  bool modified;            // with score modifiers: mask, ALiBi or softcap. It computes what has none too
  bool paged = false;       // on mma.sync: keys are a cache's, paged or contiguous, by seq_lens; without a mask
};

struct AttentionKernel {
  Arch arch;
  AttentionInstance instance;
  bool (*reads)(const AttentionParams& p);              // the keys from where they are
  AttentionChoice (*choose)(const AttentionParams& p);  // tile and split
};

using AttentionKernels = Registered<AttentionParams, AttentionKernel>;
using Attention8bitKernels = Registered<Attention8bitParams, AttentionKernel>;

// attention_decode of many rows as prefill of a cache, where a kernel takes less time so than decode's. False: decode's
// takes less, or none takes the call.
bool choose_prefill(const AttentionDecodeParams& p, AttentionDecodeChoice& choice);

}  // namespace forwardpass
