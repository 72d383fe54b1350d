#include "params/int8_gemm.h"
#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/int8_operands.h"
#include "torch/quantized_rows.h"
#include "torch/torch_ops.h"

namespace forwardpass {

Tensor int8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& w_scale, OptionalTensor bias,
                   std::optional<std::string> activation, ScalarType out_dtype, OptionalTensor scale,
                   OptionalTensor zero_point, bool symmetric, OptionalTensor channel_scale, OptionalTensor w_sum) {
  const char* op = "int8_linear";
  QuantizeParams q{};
  q.x = matrix(x, op, "x");
  const Matrix w = weight_operand(weight, Dtype::i8, q.x.columns, x, op, "weight");
  STD_TORCH_CHECK(is_float(q.x.dtype), op, ": x must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(w_sum.has_value() == !symmetric, op, ": w_sum goes with symmetric=False, and only with it");
  check_int8_depth(w.columns, !symmetric, op);

  const QuantizeOptions options{ScalarType::Char, scale, zero_point, std::nullopt, symmetric, channel_scale};
  auto sizes = sizes_of(x);
  sizes.back() = w.rows;
  const OptionalTensor none;
  if (backend != Backend::cpu) {  // what passes between the two kernels is in one workspace
    auto [out, e] = epilogue(sizes, q.x.rows, {none, w_scale, bias, activation, out_dtype, none, none, none}, x, op);
    e.b_sum = ints(w_sum, w.rows, x, op, "w_sum");
    q.out = quantized_options(q.x.columns, options, x, op);
    quantize_and_multiply<Int8GemmParams>(backend, q, {{}, w, {}, e, {}, nullptr, 0}, x);
    return out;
  }

  Quantized operands;
  std::tie(operands, q.out) = quantized_rows({q.x.rows, q.x.columns}, options, x, op);
  auto& [a, a_scale, a_zero_point] = operands;
  if (scale) a_scale = *scale;
  if (zero_point) a_zero_point = *zero_point;
  const OptionalTensor shift = symmetric ? none : OptionalTensor(a_zero_point);
  auto [out, e] = epilogue(sizes, q.x.rows, {a_scale, w_scale, bias, activation, out_dtype, none, shift, w_sum}, x, op);
  if (out.numel()) int8_gemm_cpu(a, transposed(weight, w), e, &q);
  return out;
}

}  // namespace forwardpass
