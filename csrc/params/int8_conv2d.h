#pragma once
// What the torch side and the kernels of int8_conv2d share: a convolution of images with channels last.
#include "params/common.h"

namespace forwardpass {

// x [images, height, width, channels], all groups' channels dense. Output pixel (h, w) of channel o of group g is the
// sum over (r, s, c) of x[h * stride_h + r * dilation_h - padding_h, w * stride_w + s * dilation_w - padding_w,
// g * channels / groups + c] * weight[o, r, s, c], where x is zero outside of the image.
struct Conv2dShape {
  int64_t images, height, width, channels;
  int64_t image_stride, row_stride, pixel_stride;  // of x, in elements
  int64_t kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w, groups;
  int64_t out_height, out_width;

  HOST_DEVICE int64_t group_channels() const { return channels / groups; }
  HOST_DEVICE int64_t depth() const { return kernel_h * kernel_w * group_channels(); }  // K of the product
  HOST_DEVICE int64_t out_pixels() const { return images * out_height * out_width; }    // M of the product
  // Whether it is a GEMM of x as it lies, [out_pixels, channels].
  bool is_gemm() const {
    return kernel_h == 1 && kernel_w == 1 && stride_h == 1 && stride_w == 1 && !padding_h && !padding_w &&
           groups == 1 && (height == 1 || row_stride == width * pixel_stride) &&
           (images == 1 || image_stride == height * width * pixel_stride);
  }
};

// The epilogue's rows are output pixels, its columns output channels of all groups. Its a_scale is x_scale: of each
// image where scale_per_image says so, and then the epilogue's own a_scale_per_row is false.
struct Int8Conv2dParams {
  const int8_t* x;
  Conv2dShape shape;
  Matrix w;  // i8 [out channels, depth], rows of (r, s, c)
  Epilogue epilogue;
  bool scale_per_image;
};

}  // namespace forwardpass
