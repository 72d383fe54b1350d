#pragma once
// Torch side of what fp8_gemm and fp8_linear share: the weight's scales.
#include "params/gemm.h"
#include "torch/ops.h"

namespace forwardpass {

// Fills in the 128 x 128 block scales of b [n, k]; gated: [2, ...], those of gate and those of up.
void b_block_scales(const Tensor& b_scale, int64_t n, int64_t k, bool gated, const Tensor& like, const char* op,
                    BlockScales& blocks);

}  // namespace forwardpass
