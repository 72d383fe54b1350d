// int8_conv2d on a GPU: a GEMM as it is where the windows are single pixels, else one of windows for each group.
#include "torch/gemm.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

constexpr const char* kOp = "int8_conv2d";
constexpr int64_t kAlignment = 16;

bool is_aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % kAlignment == 0; }

// A copy of v, int8 of these sizes and strides, whose last dimension is padded by zeros to `channels`.
Tensor padded_copy(const Tensor& v, const std::vector<int64_t>& sizes, const std::vector<int64_t>& strides,
                   int64_t channels) {
  std::vector<int64_t> padded = sizes, steps(sizes.size(), 1);
  padded.back() = channels;
  for (size_t d = sizes.size() - 1; d > 0; --d) steps[d - 1] = steps[d] * padded[d];
  Tensor copy = contiguous_rows(padded, ScalarType::Char, v);
  if (channels != sizes.back()) torch::stable::zero_(copy);
  Tensor inside = reshaped(copy, sizes, steps);
  torch::stable::copy_(inside, reshaped(v, sizes, strides));
  return copy;
}

// What a GEMM of windows reads: x and weight, or copies where channels or addresses are no multiples of 16.
struct WindowOperands {
  Conv2dShape shape;  // of one group
  const int8_t *x, *weight;
  std::vector<Tensor> copies;

  WindowOperands(const Tensor& x_tensor, const Tensor& weight_tensor, const Int8Conv2dParams& p)
      : shape(p.shape), x(p.x), weight(static_cast<const int8_t*>(p.w.data)) {
    const Conv2dShape& s = p.shape;
    const int64_t channels = s.group_channels(), padded = round_up(channels, kAlignment);
    // the stride of a single image, row or pixel is arbitrary
    if (s.width == 1) shape.pixel_stride = round_up(s.channels, kAlignment);
    if (s.height == 1) shape.row_stride = shape.pixel_stride * s.width;
    if (s.images == 1) shape.image_stride = shape.row_stride * s.height;
    shape.channels = padded, shape.groups = 1;
    if (padded != channels || !is_aligned(x) || shape.pixel_stride % kAlignment || shape.row_stride % kAlignment ||
        shape.image_stride % kAlignment) {
      x = take(padded_copy(x_tensor, {s.images, s.height, s.width, s.groups, channels},
                           {s.image_stride, s.row_stride, s.pixel_stride, channels, 1}, padded));
      shape.pixel_stride = s.groups * padded;
      shape.row_stride = s.width * shape.pixel_stride;
      shape.image_stride = s.height * shape.row_stride;
    }
    if (padded != channels || !is_aligned(weight))
      weight = take(
          padded_copy(weight_tensor, {p.w.rows, s.kernel_h * s.kernel_w, channels}, {s.depth(), channels, 1}, padded));
  }

 private:
  const int8_t* take(Tensor copy) {
    copies.push_back(std::move(copy));
    return static_cast<const int8_t*>(copies.back().const_data_ptr());
  }
};

// The epilogue of the columns from `first` on.
Epilogue from_column(Epilogue e, int64_t first) {
  const auto behind = [](const void* p, int64_t bytes) { return p ? static_cast<const char*>(p) + bytes : nullptr; };
  const int64_t out_bytes = first * size_of(e.out_dtype);
  if (e.b_scale_per_column) e.b_scale += first;
  if (e.out_scale_per_column) e.out_scale += first;
  e.bias = behind(e.bias, first * size_of(e.bias_dtype));
  e.residual = behind(e.residual, out_bytes);
  e.out = static_cast<char*>(e.out) + out_bytes;
  return e;
}

void multiply_windows(Backend backend, const Tensor& x, const Tensor& weight, const Int8Conv2dParams& p) {
  const WindowOperands operands(x, weight, p);
  const Conv2dShape& s = operands.shape;
  const int64_t groups = p.shape.groups, columns = p.w.rows / groups, depth = s.depth();
  for (int64_t g = 0; g < groups; ++g) {
    GemmParams gemm{};
    gemm.kind = GemmKind::int8_conv2d;
    gemm.windows = s;
    gemm.a = {operands.x + g * s.channels, Dtype::i8, s.out_pixels(), depth, s.pixel_stride};
    gemm.b = {operands.weight + g * columns * depth, Dtype::i8, columns, depth, depth};
    gemm.epilogue = from_column(p.epilogue, g * columns);
    run_gemm(backend, gemm, x);
  }
}

}  // namespace

void int8_conv2d_gpu(Backend backend, const Tensor& x, const Tensor& weight, const Tensor& x_scale,
                     Int8Conv2dParams p) {
  const Conv2dShape& s = p.shape;
  STD_TORCH_CHECK(std::max(s.kernel_h, s.kernel_w) <= kMostKernelSide, kOp, ": weight must have at most ",
                  kMostKernelSide, " rows and columns here");
  STD_TORCH_CHECK(std::max(s.height + 2 * s.padding_h, s.width + 2 * s.padding_w) <= INT32_MAX, kOp,
                  ": x must have fewer than 2^31 rows and columns with its padding");
  OptionalTensor scales;  // each output pixel's, where each image has one
  if (p.scale_per_image) {
    const std::vector<int64_t> pixels{s.images, s.out_height * s.out_width};
    scales = contiguous_rows(pixels, ScalarType::Float, x);
    torch::stable::copy_(*scales, reshaped(x_scale, pixels, {1, 0}));
    p.epilogue.a_scale = static_cast<const float*>(scales->const_data_ptr());
    p.epilogue.a_scale_per_row = true;
  }
  if (!s.is_gemm()) return multiply_windows(backend, x, weight, p);
  GemmParams gemm{};
  gemm.kind = GemmKind::int8;
  gemm.a = {p.x, Dtype::i8, s.out_pixels(), s.channels, s.out_pixels() == 1 ? s.channels : s.pixel_stride};
  gemm.b = p.w;
  gemm.epilogue = p.epilogue;
  run_gemm(backend, gemm, x);
}

}  // namespace forwardpass
