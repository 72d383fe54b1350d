#pragma once
// Torch side of what fp8_gemm and fp8_linear share: checks of the operands.
#include "common/gemm.h"
#include "ops.h"

namespace forwardpass {

// t as a matrix, on x's device.
Matrix fp8_operand(const Tensor& t, const Tensor& x, const char* op, const char* name);

// Fills in the scales of 128 x 128 blocks of b [n, k], gated ones [2, ...], those of gate and those of up.
void b_block_scales(const Tensor& b_scale, int64_t n, int64_t k, bool gated, const Tensor& like, const char* op,
                    BlockScales& blocks);

}  // namespace forwardpass
