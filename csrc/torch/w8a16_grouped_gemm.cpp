#include "cpu/w8a16_gemm.h"
#include "torch/epilogue.h"
#include "torch/experts.h"
#include "torch/gemm.h"
#include "torch/ops.h"

namespace forwardpass {

Tensor w8a16_grouped_gemm(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& weight_scale,
                          const Tensor& offs, const OptionalTensor& bias,
                          const std::optional<std::string>& activation) {
  const char* op = "w8a16_grouped_gemm";
  GemmParams p{};
  p.kind = GemmKind::w8a16;
  p.a = matrix(x, op, "x");
  STD_TORCH_CHECK(is_float(p.a.dtype), op, ": x must be float16, bfloat16 or float32");
  STD_TORCH_CHECK(backend == Backend::cpu || p.a.dtype != Dtype::f32, op, ": on a GPU x must be float16 or bfloat16");
  const Dtype w_dtype = dtype_of(weight.scalar_type(), op, "weight");
  STD_TORCH_CHECK(w_dtype == Dtype::i8 || w_dtype == Dtype::e4m3, op, ": weight must be int8 or float8_e4m3fn");
  p.b = expert_weight(weight, w_dtype, p.a, x, op, "weight");
  p.groups = groups(x, weight, offs, op);
  auto sizes = sizes_of(x);
  sizes.back() = weight.size(1);
  Tensor out;
  std::tie(out, p.epilogue) =
      epilogue(sizes, p.a.rows, {.activation = activation_of(activation, op), .out_dtype = x.scalar_type()}, x, op);
  const bool in_groups = weight_scale.dim() == 3;
  take_experts(p.epilogue, weight, in_groups ? OptionalTensorRef{} : OptionalTensorRef{weight_scale}, bias, {}, x, op);
  if (in_groups) {
    STD_TORCH_CHECK(backend == Backend::cpu, op, ": weight_scale of groups of columns is for the CPU and Triton");
    const int64_t groups = ceil_div(p.b.columns, kScaleBlock);
    check_sizes(weight_scale, {weight.size(0), weight.size(1), groups}, op, "weight_scale");
    p.blocks.b = elements<float>(weight_scale, p.b.rows * groups, ScalarType::Float, x, op, "weight_scale");
  }
  if (backend != Backend::cpu) {
    run_gemm(backend, p, x);
    return out;
  }
  if (out.numel()) w8a16_grouped_gemm_cpu(x, p);
  return out;
}

}  // namespace forwardpass
