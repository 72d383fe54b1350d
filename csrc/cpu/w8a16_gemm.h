#pragma once
#include "torch/check.h"

namespace forwardpass {

// x [M, K] times an 8-bit weight [N, K] transposed, then the epilogue. block_scale: [N, ceil(K / 128)] contiguous, or
// null.
void w8a16_gemm_cpu(const Tensor& x, const Matrix& w, const float* block_scale, const Epilogue& epilogue);

}  // namespace forwardpass
