#pragma once
// Torch side of what fp8_gemm, fp8_grouped_gemm and fp8_linear share: block scales.
#include "params/gemm.h"
#include "torch/ops.h"

namespace forwardpass {

// Fills in the 128 x 128 block scales of b [n, k]; gated: [2, ...], those of gate and those of up. experts: [experts,
// ...], of as many such b; 0: of one.
void b_block_scales(const Tensor& b_scale, int64_t n, int64_t k, bool gated, const Tensor& like, const char* op,
                    BlockScales& blocks, int64_t experts = 0);
// Fills in the 1 x 128 scales of a, in the layout in which `quantize` returns them: [lead..., K blocks], rows
// contiguous.
void a_block_scales(const Tensor& a_scale, const Matrix& a, const Tensor& like, const char* op, BlockScales& blocks);

}  // namespace forwardpass
