#include "params/dequant_activation.h"

#include "torch/epilogue.h"

namespace forwardpass {

Tensor dequant_activation(Backend backend, const Tensor& acc, OptionalTensor a_scale, OptionalTensor b_scale,
                          OptionalTensor bias, std::optional<std::string> activation, ScalarType out_dtype,
                          OptionalTensor out_scale, OptionalTensor a_zero_point, OptionalTensor b_sum) {
  DequantActivationParams p{};
  p.acc = matrix(acc, "dequant_activation", "acc");
  STD_TORCH_CHECK(is_float(p.acc.dtype) || p.acc.dtype == Dtype::i32,
                  "dequant_activation: acc must be int32, float32, float16 or bfloat16");
  STD_TORCH_CHECK(p.acc.dtype == Dtype::i32 || !a_zero_point,
                  "dequant_activation: a_zero_point goes with int32 accumulators");
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes_of(acc), p.acc.rows,
                                       {a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum},
                                       acc, "dequant_activation");
  if (acc.numel()) launch(backend, p, acc, dequant_activation_cpu);
  return out;
}

}  // namespace forwardpass
