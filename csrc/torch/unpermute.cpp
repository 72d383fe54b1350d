#include "params/unpermute.h"

#include "torch/ops.h"

namespace forwardpass {

Tensor unpermute(Backend backend, const Tensor& y, const Tensor& position, const Tensor& weights) {
  const char* op = "unpermute";
  UnpermuteParams p{};
  p.y = matrix(y, op, "y");
  STD_TORCH_CHECK(y.dim() >= 2 && is_float(p.y.dtype), op, ": y must be float32, float16 or bfloat16 [rows, N]");
  STD_TORCH_CHECK(position.dim() == 2 && weights.dim() == 2 && weights.size(0) == position.size(0), op,
                  ": position and weights must be of one shape [T, k]");
  p.tokens = position.size(0);
  p.choices = size32(position.size(1), op, "choices of a token");
  p.position = elements<int32_t>(position, position.numel(), ScalarType::Int, y, op, "position");
  p.weights_dtype = dtype_of(weights.scalar_type(), op, "weights");
  STD_TORCH_CHECK(p.weights_dtype == Dtype::f32 || p.weights_dtype == p.y.dtype, op,
                  ": weights must be float32 or of y's dtype");
  p.weights = elements<void>(weights, position.numel(), weights.scalar_type(), y, op, "weights");
  Tensor out = contiguous_rows({p.tokens, p.y.columns}, y.scalar_type(), y);
  p.out = out.mutable_data_ptr();
  if (backend != Backend::cpu) p.device = device_of(backend, y);
  if (out.numel()) launch(backend, p, y, unpermute_cpu);
  return out;
}

}  // namespace forwardpass
