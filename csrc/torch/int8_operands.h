#pragma once
// Torch side of what int8_gemm and int8_linear share: a check, and the GEMM on the CPU.
#include "params/gemm.h"
#include "params/int8_conv2d.h"
#include "params/quantize.h"
#include "torch/ops.h"

namespace forwardpass {

// Throws if the sum of k products could overflow an int32: 131072 times (-128)^2 is 2^31, one too many. With a zero
// point a factor is up to 255, and 65793 products of 255 and -128 still fit.
void check_int8_depth(int64_t k, bool zero_point, const char* op);

// int8 a [M, K] times b [N, K], transposed, then the epilogue. x: the tensor that a is the matrix of or, with
// `quantize`, is quantised from: a then has no memory, and gets some only where torch multiplies. `packed`: what
// pack_int8_weight returned for b, or none.
void int8_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const Epilogue& epilogue,
                   const QuantizeParams* quantize, OptionalTensorRef packed = {});

// int8_conv2d on the CPU. x: the tensor that p.x is of.
void int8_conv2d_cpu(const Tensor& x, const Int8Conv2dParams& p, OptionalTensorRef packed);
// On a GPU. x, weight, x_scale: the tensors that p has the memory of.
void int8_conv2d_gpu(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& x_scale, Int8Conv2dParams p);

// What pack_int8_weight returned, or none, beside an input x.
inline void check_packed(OptionalTensorRef packed, const Tensor& x, const char* op) {
  STD_TORCH_CHECK(!packed || (packed->scalar_type() == ScalarType::Char && same_device(*packed, x)), op,
                  ": packed must be int8, on the input's device");
}

// Whether it computes whole rows of so many, so that its epilogue may quantise them.
bool int8_gemm_has_whole_rows(const Matrix& a);

// The same of each expert's rows of a, which p.a is the matrix of.
void int8_grouped_gemm_cpu(const Tensor& a, const GemmParams& p);

}  // namespace forwardpass
