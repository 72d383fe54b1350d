#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {

void check_int8_depth(int64_t k, bool zero_point, const char* op) {
  STD_TORCH_CHECK(k <= (zero_point ? 65536 : 131071), op, ": K = ", k, " could overflow int32 accumulators");
}

Tensor int8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                 const OptionalTensor& out_scale, const OptionalTensor& a_zero_point, const OptionalTensor& b_sum,
                 const OptionalTensor& residual) {
  const char* op = "int8_gemm";
  GemmParams p{};
  p.kind = GemmKind::int8;
  p.a = operand(a, Dtype::i8, a, op, "a");
  p.b = b_operand(b, Dtype::i8, p.a.columns, a, op, "b");
  check_int8_depth(p.a.columns, a_zero_point.has_value(), op);
  auto sizes = sizes_of(a);
  sizes.back() = p.b.rows;
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes, p.a.rows,
                                       {.a_scale = a_scale,
                                        .b_scale = b_scale,
                                        .bias = bias,
                                        .activation = activation_of(activation, op),
                                        .out_dtype = out_dtype,
                                        .out_scale = out_scale,
                                        .a_zero_point = a_zero_point,
                                        .b_sum = b_sum,
                                        .residual = residual},
                                       a, op);
  if (backend != Backend::cpu) {
    run_gemm(backend, p, a);
  } else if (out.numel()) {
    int8_gemm_cpu(a, p.a, p.b, p.epilogue, nullptr);
  }
  return out;
}

}  // namespace forwardpass
