#pragma once
// The second launch of a split-K whose partial sums are in the workspace.
#include "kernels/dequant_activation/dequant_activation.h"
#include "params/gemm.h"

namespace forwardpass {

// Adds the partial sums and runs the epilogue, if there are any.
inline cudaError_t reduce_splits(const GemmParams& p, Dtype acc, cudaStream_t stream) {
  if (!p.partial) return cudaSuccess;
  const Matrix sums{p.partial, acc, p.a.rows, p.b.rows, p.partial_stride};
  return launch_dequant_activation({sums, p.epilogue}, p.choice.splits, p.a.rows * p.partial_stride, stream,
                                   p.choice.arch);
}

}  // namespace forwardpass
