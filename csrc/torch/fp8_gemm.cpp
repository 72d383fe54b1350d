#include "torch/epilogue.h"
#include "torch/fp8_operands.h"
#include "torch/gemm.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

void b_block_scales(const Tensor& b_scale, int64_t n, int64_t k, bool gated, const Tensor& like, const char* op,
                    BlockScales& blocks, int64_t experts) {
  const int64_t matrices = gated ? 2 : 1, rows = ceil_div(n / matrices, kScaleBlock),
                columns = ceil_div(k, kScaleBlock);
  const int64_t dim = b_scale.dim();
  STD_TORCH_CHECK(
      dim == (gated ? 3 : 2) + (experts ? 1 : 0) && b_scale.size(dim - 2) == rows && b_scale.size(dim - 1) == columns,
      op, ": block scales of b must be [", experts ? "E, " : "", gated ? "2, " : "", rows, ", ", columns, "]");
  blocks.b = elements<float>(b_scale, std::max<int64_t>(experts, 1) * matrices * rows * columns, ScalarType::Float,
                             like, op, "b_scale");
  blocks.up_offset = gated ? rows * columns : 0;
}

void a_block_scales(const Tensor& a_scale, const Matrix& a, const Tensor& like, const char* op, BlockScales& blocks) {
  const int64_t dim = a_scale.dim(), columns = ceil_div(a.columns, kScaleBlock);
  STD_TORCH_CHECK(a_scale.scalar_type() == ScalarType::Float && same_device(a_scale, like), op,
                  ": a_scale must be float32 on the device of a");
  STD_TORCH_CHECK(dim == like.dim() && a_scale.size(dim - 1) == columns && a_scale.numel() == a.rows * columns, op,
                  ": block scales of a must be [..., ", columns, "]");
  int64_t stride = 1;
  for (int64_t d = dim - 2; d >= 0; --d) {
    STD_TORCH_CHECK(a_scale.size(d) == 1 || a_scale.stride(d) == stride, op,
                    ": block scales of a must have their rows contiguous");
    stride *= a_scale.size(d);
  }
  blocks.a = static_cast<const float*>(a_scale.const_data_ptr());
  blocks.a_stride = columns == 1 ? round_up(a.rows, 4) : a_scale.stride(dim - 1);
  STD_TORCH_CHECK(
      reinterpret_cast<uintptr_t>(blocks.a) % 16 == 0 && blocks.a_stride % 4 == 0, op,
      ": block scales of a must begin at 16 bytes and their groups a multiple of 4 apart, as quantize returns them");
}

namespace {

// The output is neither allocated nor in the params yet.
struct CheckedGemm {
  std::vector<int64_t> out_sizes;
  GemmParams params;
};

CheckedGemm check_gemm(const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                       EpilogueOptions options, const char* op) {
  std::vector<int64_t> sizes = sizes_of(a);
  GemmParams p{};
  p.kind = GemmKind::fp8;
  p.a = operand(a, Dtype::e4m3, a, op, "a");
  p.b = b_operand(b, Dtype::e4m3, p.a.columns, a, op, "b");
  sizes.back() = p.b.rows;
  const bool blocks = b_scale.dim() >= 2;
  if (!blocks) {
    options.a_scale = a_scale;
    options.b_scale = b_scale;
  }
  p.epilogue = epilogue_options(sizes, p.a.rows, options, a, op);
  if (blocks) {
    b_block_scales(b_scale, p.b.rows, p.b.columns, is_gated(p.epilogue.activation), a, op, p.blocks);
    a_block_scales(a_scale, p.a, a, op, p.blocks);
  }
  return {std::move(sizes), p};
}

}  // namespace

Tensor fp8_gemm(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                const OptionalTensor& bias, const std::optional<std::string>& activation, ScalarType out_dtype,
                const OptionalTensor& out_scale, const OptionalTensor& residual, const OptionalTensor& ada_gate) {
  const char* op = "fp8_gemm";
  auto [sizes, p] = check_gemm(a, b, a_scale, b_scale,
                               {.bias = bias,
                                .activation = activation_of(activation, op),
                                .out_dtype = out_dtype,
                                .out_scale = out_scale,
                                .residual = residual,
                                .ada_gate = ada_gate},
                               op);
  const Tensor out = epilogue_output(p.epilogue, sizes, out_dtype, a);
  run_gemm(backend, p, a);
  return out;
}

// On wgmma a block has all columns of a group, or of a row of up to 256 columns, unless there is split-K.
std::tuple<Tensor, Tensor> fp8_gemm_quantize(Backend backend, const Tensor& a, const Tensor& b, const Tensor& a_scale,
                                             const Tensor& b_scale, const OptionalTensor& bias,
                                             const std::optional<std::string>& activation,
                                             std::optional<int64_t> group_size) {
  const char* op = "fp8_gemm_quantize";
  STD_TORCH_CHECK(group_size.value_or(kScaleBlock) == kScaleBlock, op, ": group_size must be ", kScaleBlock,
                  ", or none");
  const QuantizeOptions options{.dtype = ScalarType::Float8_e4m3fn, .group_size = group_size};
  auto [sizes, p] =
      check_gemm(a, b, a_scale, b_scale,
                 {.bias = bias, .activation = activation_of(activation, op), .out_dtype = ScalarType::Float}, op);
  STD_TORCH_CHECK(group_size || p.b.rows, op, ": b must have at least one row");
  const bool empty = p.a.rows == 0 || p.b.rows == 0;
  const bool gated = is_gated(p.epilogue.activation);
  int64_t group = kScaleBlock * (gated ? 2 : 1);
  if (!group_size && (!gated || p.b.rows > group)) group = std::min<int64_t>(p.b.rows, INT32_MAX);
  const KernelChoice choice = empty ? KernelChoice{} : select_kernel(backend, p, a, static_cast<int32_t>(group));
  const bool whole = empty || (choice.quantizes && choice.splits == 1);
  if (whole) p.choice = choice;
  return quantized_gemm(backend, p, whole, sizes, options, a, op);
}

}  // namespace forwardpass
