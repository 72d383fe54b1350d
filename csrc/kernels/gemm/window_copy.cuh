#pragma once
// A convolution's windows as rows of a, by cp.async: implicit GEMM on mma.sync. A row is an output pixel. Its columns
// are the channels of the pixels under the kernel, tap by tap, so a slice of K is some channels of one tap or, of few
// channels, several taps. What lies outside of the image is filled with zeros by cp.async itself.
//
// A thread's rows each have an address, that of their chunk in the tap that the thread is at, and two sets of bits: the
// rows and the columns of the kernel that are outside of the image there. Within a tap a copy is that of a matrix. From
// one tap to the next every address moves by the same distance, and whether a row's tap is inside is one test of bits.
#include "kernels/gemm/mma_mainloop.cuh"

namespace forwardpass {

template <class Config>
struct WindowCopy {
  static constexpr int kSliceK = Config::kStageK, kRows = Config::kM;
  static constexpr bool kInOrder = true;  // slices are copied one after the other
  static constexpr int kRowBit = 16;      // of the kernel's first row, behind the bits of its columns
  static_assert(kRowBit + kMostKernelSide < 32 && kMostKernelSide <= kRowBit);
  using Share = CopyShare<kSliceK, kRows, Config::kThreads>;

  const Windows& windows;
  const uint8_t* pixel[Share::kCount];  // this thread's chunk in the slice that is copied at `ahead` 0
  uint32_t outside[Share::kCount];      // taps: bits of the kernel's columns and rows
  uint32_t tap;                         // its column's bit and its row's
  int channel;                          // the chunk's in the tap
  uint32_t to;

  __device__ WindowCopy(const GemmArguments& p, int64_t first_row, int64_t k, int64_t, uint8_t* stage)
      : windows(p.windows) {
    const Windows& s = windows;
    to = ptx::shared_address(stage) + Share::offset();
    const uint32_t chunk = static_cast<uint32_t>(k) + Share::chunk() * 16, number = chunk / s.channels,
                   row = number / s.kernel_w, column = number - row * s.kernel_w;
    channel = static_cast<int>(chunk - number * s.channels);
    tap = 1u << column | 1u << kRowBit << min(row, static_cast<uint32_t>(s.kernel_h));
    const int64_t in_window = row * s.dilation_h * s.row_stride + column * s.dilation_w * s.pixel_stride + channel;
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      // Rows beyond the last one read that one again, as their outputs are not stored.
      const WindowPlace place(s, static_cast<uint32_t>(min(first_row + Share::row() + i * Share::kStep, p.a.rows - 1)));
      pixel[i] = static_cast<const uint8_t*>(p.a.data) + place.image * s.image_stride + place.y * s.row_stride +
                 place.x * s.pixel_stride + in_window;
      outside[i] = bits_outside(s.kernel_w, place.x, s.dilation_w, s.width) |
                   bits_outside(s.kernel_h, place.y, s.dilation_h, s.height) << kRowBit |
                   1u << kRowBit << s.kernel_h;  // behind the last row there is no tap
    }
  }
  // Copies the slice that next() has come to, which is `ahead` slices further than the last call of advance().
  __device__ void whole(int stage, int ahead) const {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i)
      ptx::cp_async_16_or_zeros(to + stage * kRows * kSliceK + i * Share::kStep * kSliceK, pixel[i] + ahead * kSliceK,
                                outside[i] & tap);
  }
  // Of a slice that is not whole, what is beyond K has no tap.
  __device__ void masked(int stage, int ahead) const { whole(stage, ahead); }
  // On to the next slice. Behind the products of another: a branch before them keeps the loads of their operands behind
  // it, and the model's A100 takes 45 us instead of 36 for 3 x 3 of 256 channels (64 images of 14 x 14).
  __device__ void next() {
    channel += kSliceK;
    if (channel >= windows.channels) [[unlikely]]
      next_taps();
  }
  __device__ void advance(int slices) {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) pixel[i] += slices * kSliceK;
  }

 private:
  // A bit for each of `taps` from `first` on, `step` apart, that is not below `size`.
  __device__ static uint32_t bits_outside(int taps, int first, int step, int size) {
    uint32_t bits = 0;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap, first += step)
      bits |= (static_cast<uint32_t>(first) >= static_cast<uint32_t>(size)) << tap;
    return bits;
  }
  // On to the tap that the chunk is in.
  __device__ void next_taps() {
    int64_t distance = 0;
    do {
      channel -= windows.channels;
      distance += windows.to_next_tap;
      const uint32_t column = tap << 1 & 0xffff, row = tap & ~0xffffu;
      tap = column | row;
      if (column >> windows.kernel_w) {
        distance += windows.to_next_row;
        const uint32_t behind_last = 1u << kRowBit << windows.kernel_h;
        tap = 1 | (row < behind_last ? row << 1 : behind_last);
      }
    } while (channel >= windows.channels);
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) pixel[i] += distance;
  }
};

template <class Config>
struct WindowMainloop : MmaMainloopOf<Config, WindowCopy<Config>> {
  using MmaMainloopOf<Config, WindowCopy<Config>>::MmaMainloopOf;
};

}  // namespace forwardpass
