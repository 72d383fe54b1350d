#include "params/norm_quantize.h"

#include "torch/ops.h"
#include "torch/quantized_rows.h"

namespace forwardpass {
namespace {

Affine affine(OptionalTensorRef v, const Matrix& x, const Tensor& like, const char* op, const char* name) {
  if (!v) return {nullptr, x.dtype};
  const Dtype dtype = dtype_of(v->scalar_type(), op, name);
  STD_TORCH_CHECK(dtype == x.dtype || dtype == Dtype::f32, op, ": ", name, " must be float32 or have the dtype of x");
  return {vector<void>(v, x.columns, v->scalar_type(), like, op, name), dtype};
}

struct NormOptions {
  OptionalTensorRef weight;
  double eps;
  const std::string& kind;
  OptionalTensorRef bias;
};

// residual and residual_out: both or neither.
Quantized run(Backend backend, const char* op, const Tensor& x, OptionalTensorRef residual, Tensor* residual_out,
              const NormOptions& norm, const QuantizeOptions& quantize) {
  NormQuantizeParams p{};
  p.x = matrix(x, op, "x");
  STD_TORCH_CHECK(is_float(p.x.dtype), op, ": x must be float32, float16 or bfloat16");
  STD_TORCH_CHECK(norm.kind == "rms" || norm.kind == "layer", op, ": kind must be rms or layer");
  STD_TORCH_CHECK(norm.kind == "layer" || !norm.bias, op, ": an RMS norm has no bias");
  p.kind = norm.kind == "rms" ? Norm::rms : Norm::layer;
  p.weight = affine(norm.weight, p.x, x, op, "weight");
  p.bias = affine(norm.bias, p.x, x, op, "bias");
  STD_TORCH_CHECK(norm.eps >= 0 && std::isfinite(norm.eps), op, ": eps must be finite and at least 0");
  p.eps = static_cast<float>(norm.eps);
  if (residual) {
    p.residual = matrix(*residual, op, "residual");
    STD_TORCH_CHECK(p.residual.dtype == p.x.dtype && sizes_of(*residual) == sizes_of(x), op,
                    ": residual must have the dtype and shape of x");
    STD_TORCH_CHECK(same_device(*residual, x), op, ": residual is on another device than x");
    *residual_out = contiguous_rows(sizes_of(x), x.scalar_type(), x);
    p.residual_out = residual_out->mutable_data_ptr();
  }
  Quantized result;
  std::tie(result, p.out) = quantized_rows(sizes_of(x), quantize, x, op);
  if (x.numel()) launch(backend, p, x, norm_quantize_cpu);
  return result;
}

}  // namespace

Quantized norm_quantize(Backend backend, const Tensor& x, const OptionalTensor& weight, double eps, ScalarType dtype,
                        const std::string& kind, const OptionalTensor& bias, bool symmetric,
                        const OptionalTensor& channel_scale, std::optional<int64_t> rotate) {
  return run(backend, "norm_quantize", x, {}, nullptr, {.weight = weight, .eps = eps, .kind = kind, .bias = bias},
             {.dtype = dtype, .symmetric = symmetric, .channel_scale = channel_scale, .rotate = rotate});
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_norm_quantize(Backend backend, const Tensor& x, const Tensor& residual,
                                                             const OptionalTensor& weight, double eps, ScalarType dtype,
                                                             const std::string& kind, const OptionalTensor& bias,
                                                             bool symmetric, const OptionalTensor& channel_scale,
                                                             std::optional<int64_t> rotate) {
  Tensor residual_out;
  auto [q, scale, zero_point] =
      run(backend, "add_norm_quantize", x, residual, &residual_out,
          {.weight = weight, .eps = eps, .kind = kind, .bias = bias},
          {.dtype = dtype, .symmetric = symmetric, .channel_scale = channel_scale, .rotate = rotate});
  return {q, scale, zero_point, residual_out};
}

}  // namespace forwardpass
