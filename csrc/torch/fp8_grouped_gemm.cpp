#include "torch/epilogue.h"
#include "torch/experts.h"
#include "torch/fp8_operands.h"
#include "torch/gemm.h"

namespace forwardpass {

Tensor fp8_grouped_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                        const Tensor& offs, const OptionalTensor& bias, const std::optional<std::string>& activation,
                        ScalarType out_dtype, const OptionalTensor& out_scale) {
  const char* op = "fp8_grouped_gemm";
  GemmParams p{};
  p.kind = GemmKind::fp8;
  p.a = operand(a, Dtype::e4m3, a, op, "a");
  p.b = expert_weight(b, Dtype::e4m3, p.a, a, op, "b");
  p.groups = groups(a, b, offs, op);
  auto sizes = sizes_of(a);
  sizes.back() = b.size(1);
  const bool blocks = b_scale.dim() >= 3;
  EpilogueOptions options{.activation = activation_of(activation, op), .out_dtype = out_dtype, .out_scale = out_scale};
  if (!blocks) options.a_scale = a_scale;
  Tensor out;
  std::tie(out, p.epilogue) = epilogue(sizes, p.a.rows, options, a, op);
  Epilogue& e = p.epilogue;
  take_experts(e, b, blocks ? OptionalTensorRef{} : OptionalTensorRef{b_scale}, bias, {}, a, op);
  if (blocks) {
    b_block_scales(b_scale, b.size(1), p.b.columns, is_gated(e.activation), a, op, p.blocks, b.size(0));
    a_block_scales(a_scale, p.a, a, op, p.blocks);
  }
  run_gemm(backend, p, a);
  return out;
}

}  // namespace forwardpass
