#include "params/int8_conv2d.h"

#include "torch/epilogue.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

constexpr const char* kOp = "int8_conv2d";

// [N, C, H, W] as [N, H, W, C].
Tensor channels_last(const Tensor& t, const char* name) {
  STD_TORCH_CHECK(t.dim() == 4, kOp, ": ", name, " must have four dimensions");
  return reshaped(t, {t.size(0), t.size(2), t.size(3), t.size(1)},
                  {t.stride(0), t.stride(2), t.stride(3), t.stride(1)});
}

std::pair<int64_t, int64_t> pair(const std::vector<int64_t>& v, int64_t least, const char* name) {
  STD_TORCH_CHECK(v.size() == 2 && v[0] >= least && v[1] >= least && v[0] <= 1 << 30 && v[1] <= 1 << 30, kOp, ": ",
                  name, " must be two integers from ", least, " on");
  return {v[0], v[1]};
}

int64_t output_size(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) {
  const int64_t padded = size + 2 * padding, covered = dilation * (kernel - 1) + 1;
  STD_TORCH_CHECK(size > 0 && kernel > 0 && covered <= padded, kOp, ": the kernel, dilated, covers ", covered, " of ",
                  padded, " padded pixels");
  return (padded - covered) / stride + 1;
}

Conv2dShape shape_of(const Tensor& x, const Tensor& weight, const std::vector<int64_t>& stride,
                     const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation, int64_t groups) {
  Conv2dShape s{};
  STD_TORCH_CHECK(x.dim() == 4 && weight.dim() == 4, kOp, ": x and weight must have four dimensions");
  s.images = x.size(0), s.channels = x.size(1), s.height = x.size(2), s.width = x.size(3);
  s.image_stride = x.stride(0), s.row_stride = x.stride(2), s.pixel_stride = x.stride(3);
  s.kernel_h = weight.size(2), s.kernel_w = weight.size(3), s.groups = groups;
  std::tie(s.stride_h, s.stride_w) = pair(stride, 1, "stride");
  std::tie(s.padding_h, s.padding_w) = pair(padding, 0, "padding");
  std::tie(s.dilation_h, s.dilation_w) = pair(dilation, 1, "dilation");
  STD_TORCH_CHECK(groups >= 1 && s.channels >= 1 && s.channels % groups == 0 && weight.size(0) >= 1 &&
                      weight.size(0) % groups == 0 && weight.size(1) == s.channels / groups,
                  kOp, ": groups must divide the channels of x and of weight, which is [C_out, C / groups, kh, kw]");
  STD_TORCH_CHECK(s.channels == 1 || x.stride(1) == 1, kOp, ": x must have its channels last in memory");
  s.out_height = output_size(s.height, s.kernel_h, s.stride_h, s.padding_h, s.dilation_h);
  s.out_width = output_size(s.width, s.kernel_w, s.stride_w, s.padding_w, s.dilation_w);
  return s;
}

}  // namespace

Tensor int8_conv2d(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& x_scale,
                   const Tensor& weight_scale, const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                   const std::vector<int64_t>& dilation, int64_t groups, const OptionalTensor& bias,
                   const std::optional<std::string>& activation, ScalarType out_dtype, const OptionalTensor& out_scale,
                   const OptionalTensor& residual, bool residual_first, const OptionalTensor& packed) {
  Int8Conv2dParams p{};
  p.shape = shape_of(x, weight, stride, padding, dilation, groups);
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Char, kOp, ": x must be int8");
  const Tensor weight_last = channels_last(weight, "weight");
  STD_TORCH_CHECK(weight_last.is_contiguous(), kOp, ": weight must have its channels last in memory");
  p.x = static_cast<const int8_t*>(x.const_data_ptr());
  p.w = operand(reshaped(weight_last, {weight.size(0), p.shape.depth()}, {p.shape.depth(), 1}), Dtype::i8, x, kOp,
                "weight");
  check_int8_depth(p.w.columns, false, kOp);
  check_packed(packed, x, kOp);
  STD_TORCH_CHECK(!residual_first || residual, kOp, ": residual_first goes with a residual");
  OptionalTensor residual_last;
  if (residual) residual_last = channels_last(*residual, "residual");
  std::vector<int64_t> sizes{p.shape.images, p.shape.out_height, p.shape.out_width, weight.size(0)};
  const Activation kind = activation_of(activation, kOp);
  STD_TORCH_CHECK(!is_gated(kind), kOp, ": there is no gated activation");
  STD_TORCH_CHECK(out_dtype != ScalarType::Float8_e4m3fn, kOp, ": there is no float8_e4m3fn output");
  p.epilogue = epilogue_options(sizes, p.shape.out_pixels(),
                                {.b_scale = weight_scale,
                                 .bias = bias,
                                 .activation = kind,
                                 .out_dtype = out_dtype,
                                 .out_scale = out_scale,
                                 .residual = residual_last,
                                 .residual_first = residual_first},
                                x, kOp);
  p.epilogue.a_scale =
      one_or_each_row<float>(x_scale, p.shape.images, ScalarType::Float, x, p.scale_per_image, kOp, "x_scale");
  const Tensor out = epilogue_output(p.epilogue, sizes, out_dtype, x);
  if (out.numel() && backend == Backend::cpu) int8_conv2d_cpu(x, p, packed);
  if (out.numel() && backend != Backend::cpu) int8_conv2d_gpu(backend, x, weight, x_scale, p);
  return reshaped(out, {sizes[0], sizes[3], sizes[1], sizes[2]},
                  {out.stride(0), out.stride(3), out.stride(1), out.stride(2)});
}

}  // namespace forwardpass
