#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/int8_operands.h"
#include "torch/quantized_rows.h"
#include "torch/torch_ops.h"

namespace forwardpass {

void check_int8_depth(int64_t k, bool zero_point, const char* op) {
  STD_TORCH_CHECK(k <= (zero_point ? 65536 : 131071), op, ": K = ", k, " could overflow int32 accumulators");
}

namespace {

// Fills in p, but for the output, whose sizes are returned.
std::vector<int64_t> check_gemm(GemmParams& p, const Tensor& a, const Tensor& b, const EpilogueOptions& options,
                                const char* op) {
  p.kind = GemmKind::int8;
  p.a = operand(a, Dtype::i8, a, op, "a");
  p.b = b_operand(b, Dtype::i8, p.a.columns, a, op, "b");
  check_int8_depth(p.a.columns, options.a_zero_point.has_value(), op);
  std::vector<int64_t> sizes = sizes_of(a);
  sizes.back() = p.b.rows;
  p.epilogue = epilogue_options(sizes, p.a.rows, options, a, op);
  return sizes;
}

void multiply(Backend backend, GemmParams p, const Tensor& a) {
  if (backend != Backend::cpu) return run_gemm(backend, p, a);
  if (p.a.rows && p.b.rows) int8_gemm_cpu(a, p.a, p.b, p.epilogue, nullptr);
}

// Whether the epilogue quantises the output's rows; chooses the kernel on a GPU. On wgmma a tile has whole rows of up
// to 256 columns, without a gate or a zero point.
bool quantizes_rows(Backend backend, GemmParams& p, const Tensor& a) {
  if (p.a.rows == 0) return true;
  if (backend == Backend::cpu) return int8_gemm_has_whole_rows(p.a);
  if (p.epilogue.zero_point || is_gated(p.epilogue.activation) || p.b.rows > INT32_MAX) return false;
  const KernelChoice choice = select_kernel(backend, p, a, static_cast<int32_t>(p.b.rows));
  if (!choice.quantizes || choice.splits > 1) return false;
  p.choice = choice;
  return true;
}

}  // namespace

Tensor int8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                 const OptionalTensor& out_scale, const OptionalTensor& a_zero_point, const OptionalTensor& b_sum,
                 const OptionalTensor& residual, const OptionalTensor& ada_gate) {
  const char* op = "int8_gemm";
  GemmParams p{};
  const auto sizes = check_gemm(p, a, b,
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
                                op);
  const Tensor out = epilogue_output(p.epilogue, sizes, out_dtype, a);
  multiply(backend, p, a);
  return out;
}

std::tuple<Tensor, Tensor> int8_gemm_quantize(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                                              const Tensor& b_scale, const OptionalTensor& bias,
                                              const std::optional<std::string>& activation,
                                              const OptionalTensor& a_zero_point, const OptionalTensor& b_sum) {
  const char* op = "int8_gemm_quantize";
  GemmParams p{};
  const auto sizes = check_gemm(p, a, b,
                                {.a_scale = a_scale,
                                 .b_scale = b_scale,
                                 .bias = bias,
                                 .activation = activation_of(activation, op),
                                 .out_dtype = ScalarType::Float,
                                 .a_zero_point = a_zero_point,
                                 .b_sum = b_sum},
                                op);
  STD_TORCH_CHECK(p.b.rows, op, ": b must have at least one row");
  const bool whole = quantizes_rows(backend, p, a);
  return quantized_gemm(backend, p, whole, sizes, {.dtype = ScalarType::Char}, a, op, multiply);
}

}  // namespace forwardpass
