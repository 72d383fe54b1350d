#include "torch/epilogue.h"
#include "torch/experts.h"
#include "torch/gemm.h"
#include "torch/int8_operands.h"

namespace forwardpass {

Tensor int8_grouped_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                         const Tensor& b_scale, const Tensor& offs, const OptionalTensor& bias,
                         const std::optional<std::string>& activation, ScalarType out_dtype,
                         const OptionalTensor& out_scale, const OptionalTensor& a_zero_point,
                         const OptionalTensor& b_sum) {
  const char* op = "int8_grouped_gemm";
  GemmParams p{};
  p.kind = GemmKind::int8;
  p.a = operand(a, Dtype::i8, a, op, "a");
  p.b = expert_weight(b, Dtype::i8, p.a, a, op, "b");
  p.groups = groups(a, b, offs, op);
  check_int8_depth(p.a.columns, a_zero_point.has_value(), op);
  auto sizes = sizes_of(a);
  sizes.back() = b.size(1);
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(
      sizes, p.a.rows,
      {.a_scale = a_scale, .activation = activation_of(activation, op), .out_dtype = out_dtype, .out_scale = out_scale},
      a, op);
  Epilogue& e = p.epilogue;
  STD_TORCH_CHECK(a_zero_point.has_value() == b_sum.has_value(), op, ": a_zero_point and b_sum go together");
  e.zero_point =
      one_or_each_row<int32_t>(a_zero_point, p.a.rows, ScalarType::Int, a, e.zero_point_per_row, op, "a_zero_point");
  take_experts(e, b, b_scale, bias, b_sum, a, op);
  if (backend != Backend::cpu) {
    run_gemm(backend, p, a);
    return out;
  }
  if (out.numel()) int8_grouped_gemm_cpu(a, p);
  return out;
}

}  // namespace forwardpass
