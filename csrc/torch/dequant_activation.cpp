#include "params/dequant_activation.h"

#include "torch/epilogue.h"

namespace forwardpass {

Tensor dequant_activation(Backend backend, const Tensor& acc, const OptionalTensor& a_scale,
                          const OptionalTensor& b_scale, const OptionalTensor& bias,
                          const std::optional<std::string>& activation, ScalarType out_dtype,
                          const OptionalTensor& out_scale, const OptionalTensor& a_zero_point,
                          const OptionalTensor& b_sum, const OptionalTensor& residual, const OptionalTensor& ada_gate) {
  const char* op = "dequant_activation";
  DequantActivationParams p{};
  p.acc = matrix(acc, op, "acc");
  STD_TORCH_CHECK(is_float(p.acc.dtype) || p.acc.dtype == Dtype::i32, op,
                  ": acc must be int32, float32, float16 or bfloat16");
  STD_TORCH_CHECK(p.acc.dtype == Dtype::i32 || !a_zero_point, op, ": a_zero_point goes with int32 accumulators");
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes_of(acc), p.acc.rows,
                                       {.a_scale = a_scale,
                                        .b_scale = b_scale,
                                        .bias = bias,
                                        .activation = activation_of(activation, op),
                                        .out_dtype = out_dtype,
                                        .out_scale = out_scale,
                                        .a_zero_point = a_zero_point,
                                        .b_sum = b_sum,
                                        .residual = residual,
                                        .ada_gate = ada_gate},
                                       acc, op);
  if (acc.numel()) launch(backend, p, acc, dequant_activation_cpu);
  return out;
}

}  // namespace forwardpass
