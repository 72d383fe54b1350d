#include "params/quantize.h"

#include "torch/ops.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

Quantized run_quantize(Backend backend, const Tensor& x, const QuantizeOptions& o, const char* op) {
  QuantizeParams p{};
  p.x = matrix(x, op, "x");
  STD_TORCH_CHECK(is_float(p.x.dtype), op, ": x must be float32, float16 or bfloat16");
  Quantized result;
  std::tie(result, p.out) = quantized_rows(sizes_of(x), o, x, op);
  if (x.numel()) launch(backend, p, x, quantize_cpu);
  return result;
}

Quantized quantize(Backend backend, const Tensor& x, ScalarType dtype, const OptionalTensor& scale,
                   const OptionalTensor& zero_point, std::optional<int64_t> group_size, bool symmetric,
                   const OptionalTensor& channel_scale, std::optional<int64_t> rotate) {
  return run_quantize(backend, x,
                      {.dtype = dtype,
                       .scale = scale,
                       .zero_point = zero_point,
                       .group_size = group_size,
                       .symmetric = symmetric,
                       .channel_scale = channel_scale,
                       .rotate = rotate},
                      "quantize");
}

}  // namespace forwardpass
