#pragma once
#include "torch/check.h"

namespace forwardpass {

// a [M, K], x as a matrix, times an 8-bit b [N, K] transposed, then the epilogue. block_scale: [N, ceil(K / 128)]
// contiguous, or null.
void w8a16_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const float* block_scale,
                    const Epilogue& epilogue);

}  // namespace forwardpass
