#include "cpu/w8a16_gemm.h"

#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/torch_ops.h"

namespace forwardpass {

Tensor w8a16_gemm(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                  const OptionalTensor& bias, const std::optional<std::string>& activation,
                  const OptionalTensor& residual, const OptionalTensor& ada_gate) {
  const char* op = "w8a16_gemm";
  GemmParams p{};
  p.kind = GemmKind::w8a16;
  p.a = matrix(x, op, "x");
  STD_TORCH_CHECK(is_float(p.a.dtype), op, ": x must be float16, bfloat16 or float32");
  STD_TORCH_CHECK(backend == Backend::cpu || p.a.dtype != Dtype::f32, op, ": on a GPU x must be float16 or bfloat16");
  const Dtype w_dtype = dtype_of(weight.scalar_type(), op, "weight");
  STD_TORCH_CHECK(w_dtype == Dtype::i8 || w_dtype == Dtype::e4m3, op, ": weight must be int8 or float8_e4m3fn");
  p.b = b_operand(weight, w_dtype, p.a.columns, x, op, "weight");
  EpilogueOptions out_options{.bias = bias,
                              .activation = activation_of(activation, op),
                              .out_dtype = x.scalar_type(),
                              .residual = residual,
                              .ada_gate = ada_gate};
  if (weight_scale.dim() == 2) {
    const int64_t groups = ceil_div(p.b.columns, kScaleBlock);
    check_sizes(weight_scale, {p.b.rows, groups}, op, "weight_scale");
    p.blocks.b = elements<float>(weight_scale, p.b.rows * groups, ScalarType::Float, x, op, "weight_scale");
  } else {
    out_options.b_scale = weight_scale;
  }
  auto sizes = sizes_of(x);
  sizes.back() = p.b.rows;
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes, p.a.rows, out_options, x, op);
  if (backend != Backend::cpu) {
    run_gemm(backend, p, x);
  } else if (out.numel()) {
    w8a16_gemm_cpu(x, p.a, p.b, p.blocks.b, p.epilogue);
  }
  return out;
}

}  // namespace forwardpass
