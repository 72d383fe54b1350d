#include "params/quantize.h"

#include "torch/ops.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

Quantized quantize(Backend backend, const Tensor& x, ScalarType dtype, OptionalTensor scale, OptionalTensor zero_point,
                   std::optional<int64_t> group_size, bool symmetric, OptionalTensor channel_scale) {
  QuantizeParams p{};
  p.x = matrix(x, "quantize", "x");
  STD_TORCH_CHECK(is_float(p.x.dtype), "quantize: x must be float32, float16 or bfloat16");
  Quantized result;
  std::tie(result, p.out) =
      quantized_rows(sizes_of(x), {dtype, scale, zero_point, group_size, symmetric, channel_scale}, x, "quantize");
  if (x.numel()) launch(backend, p, x, quantize_cpu);
  return result;
}

}  // namespace forwardpass
