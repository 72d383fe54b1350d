#pragma once
// Torch side of what int8_gemm and int8_linear share: a check, and the GEMM on the CPU by AMX or oneDNN, which take
// tensors.
#include "params/quantize.h"
#include "torch/ops.h"

namespace forwardpass {

// Throws if K products could overflow an int32: (-128)^2 131072 times is 2^31, one too many; of (a - zero point) times
// b, both int8, 65793 still fit.
void check_int8_depth(int64_t k, bool zero_point, const char* op);

// int8 a [M, K] times b transposed [K, N], then the epilogue. With `quantize`, a is computed from quantize->x and need
// not be stored.
void int8_gemm_cpu(const Tensor& a, const Tensor& b_transposed, const Epilogue& epilogue,
                   const QuantizeParams* quantize);

}  // namespace forwardpass
