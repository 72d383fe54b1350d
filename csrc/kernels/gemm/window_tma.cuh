#pragma once
// A convolution's windows as rows of a, by TMA in im2col mode: implicit GEMM on wgmma. A stage's a is one load: 128
// channels of one tap, of as many output pixels as the tile has rows, one after the other through rows and images. TMA
// steps by the stride, and fills with zeros what is outside of the image, and channels beyond the last. So a stage
// looks as that of a GEMM, and there is no other difference.
//
// The channels of a tap are padded to stages: of 64 channels half of the products are with zeros. b's columns beyond
// the tap's are the next tap's, which nothing is multiplied by.
#include "kernels/gemm/wgmma_mainloops.cuh"

namespace forwardpass {

template <class Config>
struct WindowRows {
  static constexpr int kStageK = Config::kStageK;
  static constexpr bool kLoadsEarly = false;  // a convolution follows no kernel of its own operation
  // CUtensorMap's: steps of up to 8, two corners of 8 bits with a sign each, offsets of 8 bits.
  static constexpr WindowLimits kWindows = {
      .tap_channels = kStageK, .side = INT32_MAX, .stride = 8, .corner = 127, .offset = 255};

  static cudaError_t encode(CUtensorMap& to, const GemmParams& p, const Matrix& a, int rows, int bytes) {
    static_assert(kStageK == 128);
    const Conv2dShape& s = p.windows;
    const int padding_h = static_cast<int>(s.padding_h), padding_w = static_cast<int>(s.padding_w);
    return encode_columns(to, a.data, {s.channels, s.width, s.height, s.images},
                          {s.pixel_stride, s.row_stride, s.image_stride}, {-padding_w, -padding_h},
                          {padding_w - static_cast<int>((s.kernel_w - 1) * s.dilation_w),
                           padding_h - static_cast<int>((s.kernel_h - 1) * s.dilation_h)},
                          {static_cast<int>(s.stride_w), static_cast<int>(s.stride_h)}, rows, bytes,
                          CU_TENSOR_MAP_SWIZZLE_128B);
  }
  static int64_t depth(const GemmParams& p, const Matrix&) {
    return p.windows.kernel_h * p.windows.kernel_w * ceil_div(p.windows.channels, kStageK) * kStageK;
  }

  // The producer's, of a tile.
  const Windows& windows;
  WindowPlace place;
  int channel, tap_of_b, column, row;  // the stage's first channel in its tap; b's column of the tap; the tap

  template <class P, class Tile>
  __device__ WindowRows(const P& p, const Tile& tile)
      : windows(p.mainloop.windows), place(windows, static_cast<uint32_t>(tile.row)) {
    const int stages = ceil_div(windows.channels, kStageK), stage = static_cast<int>(tile.k) / kStageK,
              tap = stage / stages;
    channel = (stage - tap * stages) * kStageK;
    tap_of_b = tap * windows.channels;
    row = tap / windows.kernel_w, column = tap - row * windows.kernel_w;
  }
  __device__ void load(uint32_t to, const CUtensorMap& map, int, uint32_t full) const {
    ptx::tma_load_pixels(to, map, {channel, place.x, place.y, place.image}, column * windows.dilation_w,
                         row * windows.dilation_h, full);
  }
  __device__ int column_of_b(int) const { return tap_of_b + channel; }
  __device__ void advance() {
    channel += kStageK;
    if (channel < windows.channels) return;
    channel = 0;
    tap_of_b += windows.channels;
    if (++column == windows.kernel_w) column = 0, ++row;
  }
};

template <class Config>
struct WindowMainloop : ExactMainloop<Config> {
  using ExactMainloop<Config>::ExactMainloop;
  using Rows = WindowRows<Config>;
  static constexpr bool kGated = false;
  struct Arguments {
    Windows windows;
  };
  static cudaError_t set_arguments(Arguments& to, const GemmParams& p, int) {
    to.windows = Windows(p.windows);
    return cudaSuccess;
  }
};

}  // namespace forwardpass
