#include "torch/epilogue.h"
#include "torch/fp8_operands.h"
#include "torch/gemm.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

Tensor fp8_linear(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                  const OptionalTensor& scale, const OptionalTensor& channel_scale, const OptionalTensor& residual,
                  std::optional<int64_t> rotate, const OptionalTensor& ada_gate) {
  const char* op = "fp8_linear";
  QuantizeParams q{};
  q.x = matrix(x, op, "x");
  STD_TORCH_CHECK(is_float(q.x.dtype), op, ": x must be float32, float16 or bfloat16");
  GemmParams p{};
  p.kind = GemmKind::fp8;
  p.b = b_operand(weight, Dtype::e4m3, q.x.columns, x, op, "weight");
  // blocks of the weight go with groups of 128 of x, a vector with whole rows
  const bool blocks = weight_scale.dim() >= 2;
  QuantizeOptions x_options{
      .dtype = ScalarType::Float8_e4m3fn, .scale = scale, .channel_scale = channel_scale, .rotate = rotate};
  EpilogueOptions out_options{.bias = bias,
                              .activation = activation_of(activation, op),
                              .out_dtype = out_dtype,
                              .residual = residual,
                              .ada_gate = ada_gate};
  if (blocks) {
    x_options.group_size = kScaleBlock;
  } else {
    out_options.b_scale = weight_scale;
  }
  q.out = quantized_options(q.x.columns, x_options, x, op);
  auto sizes = sizes_of(x);
  sizes.back() = p.b.rows;
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes, q.x.rows, out_options, x, op);
  if (blocks) b_block_scales(weight_scale, p.b.rows, p.b.columns, is_gated(p.epilogue.activation), x, op, p.blocks);
  quantize_and_multiply(backend, q, p, x);
  return out;
}

}  // namespace forwardpass
