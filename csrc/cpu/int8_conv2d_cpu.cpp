// int8_conv2d on a CPU: the int8 GEMM on rows that are gathered, those of x at the taps of a pixel.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/row_chunks.h"
#include "torch/int8_operands.h"

namespace forwardpass {
namespace {

// Row `pixel` of the product's a, of an image and a group: depth() bytes.
void gather(const Int8Conv2dParams& p, int64_t image, int64_t group, int64_t pixel, int8_t* to) {
  const Conv2dShape& s = p.shape;
  const int64_t channels = s.group_channels(), top = pixel / s.out_width * s.stride_h - s.padding_h,
                left = pixel % s.out_width * s.stride_w - s.padding_w;
  const int8_t* x = p.x + image * s.image_stride + group * channels;
  for (int64_t r = 0; r < s.kernel_h; ++r)
    for (int64_t c = 0; c < s.kernel_w; ++c, to += channels) {
      const int64_t h = top + r * s.dilation_h, w = left + c * s.dilation_w;
      if (h < 0 || h >= s.height || w < 0 || w >= s.width) {
        std::memset(to, 0, channels);
      } else {
        std::memcpy(to, x + h * s.row_stride + w * s.pixel_stride, channels);
      }
    }
}

}  // namespace

void int8_conv2d_cpu(const Tensor& x, const Int8Conv2dParams& p) {
  const Conv2dShape& s = p.shape;
  const int64_t pixels = s.out_height * s.out_width, columns = p.w.rows / s.groups;
  const Tensor rows = contiguous_rows({pixels, s.depth()}, ScalarType::Char, x);
  auto data = static_cast<int8_t*>(rows.mutable_data_ptr());
  for (int64_t image = 0; image < s.images; ++image)
    for (int64_t group = 0; group < s.groups; ++group) {
      for (int64_t i = 0; i < pixels; ++i) gather(p, image, group, i, data + i * s.depth());
      Matrix w = p.w;
      w.data = static_cast<const int8_t*>(w.data) + group * columns * w.stride, w.rows = columns;
      Epilogue e = columns_from(rows_from(p.epilogue, image * pixels), group * columns);
      if (p.scale_per_image) e.a_scale += image;
      int8_gemm_cpu(rows, {data, Dtype::i8, pixels, s.depth(), s.depth()}, w, e, nullptr);
    }
}

}  // namespace forwardpass
