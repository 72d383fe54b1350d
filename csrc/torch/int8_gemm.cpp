#include "params/int8_gemm.h"

#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {

void check_int8_depth(int64_t k, bool zero_point, const char* op) {
  STD_TORCH_CHECK(k <= (zero_point ? 65536 : 131071), op, ": K = ", k, " could overflow int32 accumulators");
}

Tensor int8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 OptionalTensor bias, std::optional<std::string> activation, ScalarType out_dtype,
                 OptionalTensor out_scale, OptionalTensor a_zero_point, OptionalTensor b_sum) {
  const Matrix am = operand(a, Dtype::i8, a, "int8_gemm", "a"),
               bm = weight_operand(b, Dtype::i8, am.columns, a, "int8_gemm", "b");
  check_int8_depth(am.columns, a_zero_point.has_value(), "int8_gemm");
  auto sizes = sizes_of(a);
  sizes.back() = bm.rows;
  auto [out, e] = epilogue(
      sizes, am.rows, {a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum}, a, "int8_gemm");
  if (backend != Backend::cpu) {
    run_gemm<Int8GemmParams>(backend, {am, bm, {}, e, {}, nullptr, 0}, a);
  } else if (out.numel()) {
    int8_gemm_cpu(as_matrix(a, am), transposed(b, bm), e, nullptr);
  }
  return out;
}

}  // namespace forwardpass
