#include "params/norm_quantize.h"

#include "torch/ops.h"
#include "torch/quantized_rows.h"

namespace forwardpass {
namespace {

SampleAffine sample_affine(OptionalTensorRef v, const Matrix& x, const Tensor& like, const char* op, const char* name) {
  if (!v) return {nullptr, x.dtype, 0};
  const Dtype dtype = dtype_of(v->scalar_type(), op, name);
  STD_TORCH_CHECK(dtype == x.dtype || dtype == Dtype::f32, op, ": ", name, " must be float32 or have the dtype of x");
  STD_TORCH_CHECK(like.dim() >= 2 && v->dim() == 2 && v->size(0) == like.size(0) && v->size(1) == x.columns, op, ": ",
                  name, " must be [B, K] for an x [B, ..., K]");
  STD_TORCH_CHECK(same_device(*v, like), op, ": ", name, " is on another device than x");
  const Matrix m = matrix(*v, op, name);
  return {m.data, dtype, m.stride * size_of(dtype)};
}

struct NormOptions {
  OptionalTensorRef weight;
  double eps;
  const std::string& kind;
  OptionalTensorRef bias;
  OptionalTensorRef ada_scale = {};
  OptionalTensorRef ada_shift = {};
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
  p.ada_scale = sample_affine(norm.ada_scale, p.x, x, op, "ada_scale");
  p.ada_shift = sample_affine(norm.ada_shift, p.x, x, op, "ada_shift");
  p.rows_per_sample = x.dim() >= 2 && x.size(0) > 0 ? p.x.rows / x.size(0) : p.x.rows;
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
                        const OptionalTensor& channel_scale, std::optional<int64_t> rotate,
                        const OptionalTensor& ada_scale, const OptionalTensor& ada_shift) {
  return run(backend, "norm_quantize", x, {}, nullptr,
             {.weight = weight, .eps = eps, .kind = kind, .bias = bias, .ada_scale = ada_scale, .ada_shift = ada_shift},
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
