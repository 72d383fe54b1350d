#pragma once
// What GEMM kernels are given: the types of their operands, and the arguments of those that read them by address.
#include "schedule/gemm_tile.cuh"

namespace forwardpass {

// Element types of the operands: the accumulator of an mma, the bytes of an element of b, whether the kernel's a is
// what the operation calls b (swap-AB), whether all outputs are of 16 bits, and whether accumulators are promoted. An
// fp8 mma keeps 13 bits of the largest product or sum (arXiv 2511.10909), so its accumulators over 128 of K are added
// to fp32 ones. int8 is exact.
struct Int8 {
  using Acc = int32_t;
  static constexpr Dtype kAcc = Dtype::i32;
  static constexpr int kSizeB = 1;
  static constexpr bool kSwapAB = false, k16Bits = false, kPromoted = false, kBlockScaled = false,
                        kOptionalBlocks = false;
};
struct E4m3 {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = 1;
  static constexpr bool kSwapAB = false, k16Bits = false, kPromoted = true, kBlockScaled = false,
                        kOptionalBlocks = false;
};
// With block scales: each partial accumulator is multiplied by them as it is promoted. A branch in the kernel on
// mma.sync without them would spill 1196 bytes.
struct E4m3Blocks : E4m3 {
  static constexpr bool kBlockScaled = true;
};
// A kernel for both: block scales are 1 where scales are of rows.
struct E4m3OptionalBlocks : E4m3Blocks {
  static constexpr bool kOptionalBlocks = true;
};

// Of a convolution's windows what a kernel reads, in 32 bits.
struct Windows {
  int32_t height, width, out_height, out_width, channels, kernel_h, kernel_w, stride_h, stride_w, padding_h, padding_w,
      dilation_h, dilation_w;
  int64_t image_stride, row_stride, pixel_stride;  // bytes
  // From a tap's end to the next one's beginning, and as much more from the last column of the kernel to the next row.
  int64_t to_next_tap, to_next_row;

  Windows() = default;
  explicit Windows(const Conv2dShape& s)
      : height(s.height),
        width(s.width),
        out_height(s.out_height),
        out_width(s.out_width),
        channels(s.channels),
        kernel_h(s.kernel_h),
        kernel_w(s.kernel_w),
        stride_h(s.stride_h),
        stride_w(s.stride_w),
        padding_h(s.padding_h),
        padding_w(s.padding_w),
        dilation_h(s.dilation_h),
        dilation_w(s.dilation_w),
        image_stride(s.image_stride),
        row_stride(s.row_stride),
        pixel_stride(s.pixel_stride),
        to_next_tap(s.dilation_w * s.pixel_stride - s.channels),
        to_next_row(s.dilation_h * s.row_stride - s.kernel_w * s.dilation_w * s.pixel_stride) {}
};

// An output pixel, and where its window begins, which may be outside of the image.
struct WindowPlace {
  int32_t image, y, x;

  __device__ WindowPlace(const Windows& s, uint32_t pixel) {
    const uint32_t row = pixel / s.out_width;
    image = row / s.out_height;
    y = static_cast<int32_t>(row - image * s.out_height) * s.stride_h - s.padding_h;
    x = static_cast<int32_t>(pixel - row * s.out_width) * s.stride_w - s.padding_w;
  }
};

// A launch of a kernel on mma.sync, or of a GEMV.
struct GemmArguments {
  Matrix a, b;
  BlockScales blocks;
  TileMap map;
  GemmOutput out;
  bool b_first;  // b may be read before earlier kernels have ended
  Groups groups;
  Windows windows;

  GemmArguments(const GemmParams& p, int64_t tiles_m, int tile_n)
      : a(p.a),
        b(p.b),
        blocks(p.blocks),
        map(tiles_m, ceil_div(p.columns(), tile_n), p.choice.splits, p.a.columns, p.choice.split_k),
        out(p, false),  // the registers are the main loop's (fragment.cuh)
        b_first(p.b_first),
        groups(p.groups),
        windows(p.windows) {}
  __device__ bool gated() const { return is_gated(out.epilogue.activation); }
};

}  // namespace forwardpass
