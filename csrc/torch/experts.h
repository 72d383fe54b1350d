#pragma once
// Torch side of what the grouped GEMMs share: which rows are an expert's, and what each expert has.
#include "params/gemm.h"
#include "torch/check.h"

namespace forwardpass {

// As ops/common/experts.py has them: kernels keep a list of as many experts in shared memory; of all experts' rows.
constexpr int64_t kMostExperts = 512, kMostGroupedRows = 1 << 22;

// b's matrix, [E, N, K], for an a [S, K] or [E, max_m, K], whose matrix is `rows`.
inline Matrix expert_weight(const Tensor& b, Dtype type, const Matrix& rows, const Tensor& a, const char* op,
                            const char* name) {
  const Matrix m = operand(b, type, a, op, name);
  STD_TORCH_CHECK(a.dim() == 2 || a.dim() == 3, op, ": the input must be [S, K] or [E, max_m, K]");
  STD_TORCH_CHECK(b.dim() == 3 && m.columns == rows.columns && (a.dim() == 2 || b.size(0) == a.size(0)), op, ": ", name,
                  " must be [E, N, ", rows.columns, "]");
  STD_TORCH_CHECK(b.size(0) >= 1 && b.size(0) <= kMostExperts, op, ": ", name, " must have 1 to ", kMostExperts,
                  " experts, and has ", b.size(0));
  STD_TORCH_CHECK(rows.rows <= kMostGroupedRows, op, ": the input must have at most ", kMostGroupedRows, " rows, not ",
                  rows.rows);
  return m;
}

inline Groups groups(const Tensor& a, const Tensor& b, const Tensor& ends, const char* op) {
  const bool sorted = a.dim() == 2;
  STD_TORCH_CHECK(ends.dim() == 1, op, ": offs must be [E]");
  return {ints(ends, b.size(0), a, op, "offs"), static_cast<int32_t>(b.size(0)), sorted, sorted ? 0 : a.size(1)};
}

// What each expert has for itself, [E, N], of b [E, N, K].
inline void take_experts(Epilogue& e, const Tensor& b, OptionalTensorRef b_scale, const OptionalTensor& bias,
                         const OptionalTensor& b_sum, const Tensor& a, const char* op) {
  const int64_t rows = b.size(0) * b.size(1);
  const auto check = [&](OptionalTensorRef t, const char* name) {
    if (t) check_sizes(*t, {b.size(0), b.size(1)}, op, name);
  };
  check(b_scale, "b_scale"), check(bias, "bias"), check(b_sum, "b_sum");
  e.b_scale = elements<float>(b_scale, rows, ScalarType::Float, a, op, "b_scale");
  e.b_scale_per_column = b_scale.has_value();
  e.b_sum = elements<int32_t>(b_sum, rows, ScalarType::Int, a, op, "b_sum");
  if (!bias) return;
  e.bias_dtype = dtype_of(bias->scalar_type(), op, "bias");
  STD_TORCH_CHECK(is_float(e.bias_dtype), op, ": bias must be float32, float16 or bfloat16");
  e.bias = elements<void>(bias, rows, bias->scalar_type(), a, op, "bias");
}

}  // namespace forwardpass
