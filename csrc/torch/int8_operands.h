#pragma once
// Torch side of what int8_gemm and int8_linear share: a check, and the product on the CPU, by AMX or oneDNN, so
// tensors go in.
#include "params/quantize.h"
#include "torch/ops.h"

namespace forwardpass {

// Throws where a sum over K products could be beyond int32: of -128 times -128 131072 are 2^31 exactly, one too many;
// of (a - zero point) times b, both in int8, 65793 still fit.
void check_int8_depth(int64_t k, bool zero_point, const char* op);

// int8 a [M, K] times b transposed [K, N], then the epilogue. With `quantize`, a is computed from quantize->x, and need
// not be written.
void int8_gemm_cpu(const Tensor& a, const Tensor& b_transposed, const Epilogue& epilogue,
                   const QuantizeParams* quantize);

}  // namespace forwardpass
