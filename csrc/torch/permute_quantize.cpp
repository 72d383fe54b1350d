#include "params/permute_quantize.h"

#include "torch/gemm.h"
#include "torch/ops.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

std::tuple<Tensor, Tensor, Tensor, Tensor> permute_quantize(Backend backend, const Tensor& x, const Tensor& index,
                                                            int64_t num_experts, ScalarType dtype,
                                                            std::optional<int64_t> group_size,
                                                            const OptionalTensor& channel_scale) {
  const char* op = "permute_quantize";
  PermuteQuantizeParams p{};
  p.x = matrix(x, op, "x");
  STD_TORCH_CHECK(x.dim() == 2 && is_float(p.x.dtype), op, ": x must be float32, float16 or bfloat16 [T, K]");
  STD_TORCH_CHECK(index.dim() == 2 && index.size(0) == p.x.rows, op, ": index must be [", p.x.rows, ", k]");
  p.wide_index = index.scalar_type() == ScalarType::Long;
  p.index = elements<void>(index, index.numel(), p.wide_index ? ScalarType::Long : ScalarType::Int, x, op, "index");
  STD_TORCH_CHECK(num_experts >= 1 && num_experts <= kCountedExperts, op, ": num_experts must be 1 to ",
                  kCountedExperts);
  p.experts = static_cast<int32_t>(num_experts);
  p.choices = size32(index.size(1), op, "choices of a token");
  const int64_t rows = size32(index.numel(), op, "elements of index");

  Tensor offs = contiguous_rows({num_experts}, ScalarType::Int, x),
         position = contiguous_rows(sizes_of(index), ScalarType::Int, x);
  Quantized quantized;
  std::tie(quantized, p.out) = quantized_rows(
      {rows, p.x.columns}, {.dtype = dtype, .group_size = group_size, .channel_scale = channel_scale}, x, op);
  p.offs = static_cast<int32_t*>(offs.mutable_data_ptr());
  p.position = static_cast<int32_t*>(position.mutable_data_ptr());
  Workspace workspace;
  if (const int64_t blocks = p.counting_blocks(); backend != Backend::cpu && blocks > 1) {
    const int64_t counts = workspace.reserve(blocks * num_experts * 4);
    workspace.allocate(x);
    p.counts = workspace.at<int32_t>(counts);
  }
  launch(backend, p, x, permute_quantize_cpu);
  return {std::get<0>(quantized), std::get<1>(quantized), offs, position};
}

}  // namespace forwardpass
