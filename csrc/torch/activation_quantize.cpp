#include "params/activation_quantize.h"

#include "torch/ops.h"
#include "torch/quantized_rows.h"

namespace forwardpass {

Quantized activation_quantize(Backend backend, const Tensor& x, const std::string& activation, ScalarType dtype,
                              std::optional<int64_t> group_size, const std::string& layout, bool symmetric,
                              const OptionalTensor& channel_scale, std::optional<int64_t> rotate) {
  const char* op = "activation_quantize";
  ActivationQuantizeParams p{};
  p.x = matrix(x, op, "x");
  p.activation = activation_of(activation, op);
  p.interleaved = layout == "interleaved8";
  const bool gated = is_gated(p.activation);
  STD_TORCH_CHECK(is_float(p.x.dtype), op, ": x must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(p.interleaved ? gated : layout == "halves", op,
                  ": layout must be halves, or, for a gated activation, interleaved8");
  STD_TORCH_CHECK(!gated || p.x.columns % (p.interleaved ? 16 : 2) == 0, op,
                  ": the last dimension of x must be a multiple of ", p.interleaved ? 16 : 2);
  std::vector<int64_t> sizes = sizes_of(x);
  if (gated) sizes.back() /= 2;
  Quantized result;
  std::tie(result, p.out) = quantized_rows(sizes,
                                           {.dtype = dtype,
                                            .group_size = group_size,
                                            .symmetric = symmetric,
                                            .channel_scale = channel_scale,
                                            .rotate = rotate},
                                           x, op);
  if (x.numel()) launch(backend, p, x, activation_quantize_cpu);
  return result;
}

}  // namespace forwardpass
