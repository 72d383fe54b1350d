#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/int8_operands.h"
#include "torch/quantized_rows.h"
#include "torch/torch_ops.h"

namespace forwardpass {

Tensor int8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                   const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                   const OptionalTensor& scale, const OptionalTensor& zero_point, bool symmetric,
                   const OptionalTensor& channel_scale, const OptionalTensor& weight_sum, const OptionalTensor& packed,
                   const OptionalTensor& residual, std::optional<int64_t> rotate, const OptionalTensor& ada_gate) {
  const char* op = "int8_linear";
  QuantizeParams q{};
  q.x = matrix(x, op, "x");
  GemmParams p{};
  p.kind = GemmKind::int8;
  p.b = b_operand(weight, Dtype::i8, q.x.columns, x, op, "weight");
  STD_TORCH_CHECK(is_float(q.x.dtype), op, ": x must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(weight_sum.has_value() == !symmetric, op, ": weight_sum goes with symmetric=False, and only with it");
  check_packed(packed, x, op);
  check_int8_depth(p.b.columns, !symmetric, op);

  const QuantizeOptions x_options{.dtype = ScalarType::Char,
                                  .scale = scale,
                                  .zero_point = zero_point,
                                  .symmetric = symmetric,
                                  .channel_scale = channel_scale,
                                  .rotate = rotate};
  const EpilogueOptions out_options{.b_scale = weight_scale,
                                    .bias = bias,
                                    .activation = activation_of(activation, op),
                                    .out_dtype = out_dtype,
                                    .residual = residual,
                                    .ada_gate = ada_gate};
  auto sizes = sizes_of(x);
  sizes.back() = p.b.rows;
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes, q.x.rows, out_options, x, op);
  p.epilogue.b_sum = ints(weight_sum, p.b.rows, x, op, "weight_sum");
  q.out = quantized_options(q.x.columns, x_options, x, op);
  if (backend != Backend::cpu) {  // what passes between the two kernels is in one workspace
    quantize_and_multiply(backend, q, p, x);
    return out;
  }

  // No tensors: two of them would take 1.4 us, of a call that takes 7.
  std::vector<float> row_scale(scale ? 0 : q.x.rows);
  std::vector<int32_t> row_zero_point(scale || symmetric ? 0 : q.x.rows);
  if (!scale) q.out.scale = row_scale.data();
  if (!scale && !symmetric) q.out.zero_point = row_zero_point.data();
  undo_quantization(p.epilogue, q.out);
  p.a = {nullptr, Dtype::i8, q.x.rows, q.x.columns, 0};
  if (out.numel()) int8_gemm_cpu(x, p.a, p.b, p.epilogue, &q, packed);
  return out;
}

}  // namespace forwardpass
