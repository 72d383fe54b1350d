#pragma once
// A convolution's windows as rows of a, by cp.async: implicit GEMM on mma.sync. A row is an output pixel. Its columns
// are the channels of the pixels under the kernel, tap by tap, so a slice of K is some channels of one tap or, of few
// channels, several taps. What lies outside of the image is filled with zeros by cp.async itself.
//
// A thread's rows each have an address, that of their chunk in the tap that the thread is at, and a bit for each row
// and each column of the kernel: whether it is inside of the image there. Within a tap a copy is that of a matrix. From
// one tap to the next every address moves by the same distance.
#include "kernels/gemm/mma_mainloop.cuh"

namespace forwardpass {

template <class Config>
struct WindowCopy {
  static constexpr int kSliceK = Config::kStageK, kRows = Config::kM;
  static constexpr bool kAddressesOnce = true;
  using Share = CopyShare<kSliceK, kRows, Config::kThreads>;
  // Bits of one of the kernel's rows or columns, one for each of this thread's rows.
  static constexpr int kBits = 64 / kMostKernelSide;
  static_assert(Share::kCount <= kBits);

  const Windows& windows;
  const uint8_t* pixel[Share::kCount];  // this thread's chunk in the slice that is copied at `ahead` 0
  uint64_t columns, rows;               // which are inside; rows: from the tap's own on
  int shift;                            // of `columns`, to the tap's own
  uint32_t inside;                      // this tap, of each of this thread's rows
  int channel;                          // the chunk's in the tap, but in rounds
  int left;                             // in rounds: slices of the tap from the one on that is copied at `ahead` 0
  uint32_t to;

  __device__ WindowCopy(const GemmArguments& p, int64_t first_row, int64_t k, int64_t, uint8_t* stage)
      : windows(p.windows), columns(0), rows(0) {
    const Windows& s = windows;
    to = ptx::shared_address(stage) + Share::offset();
    const int chunk = static_cast<int>(k) + Share::chunk() * 16, number = chunk / s.channels, row = number / s.kernel_w,
              column = number - row * s.kernel_w;
    channel = chunk - number * s.channels;
    shift = column * kBits;
    const int64_t in_window = row * s.dilation_h * s.row_stride + column * s.dilation_w * s.pixel_stride + channel;
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      // Rows beyond the last one read that one again, as their outputs are not stored.
      const WindowPlace place(s, static_cast<uint32_t>(min(first_row + Share::row() + i * Share::kStep, p.a.rows - 1)));
      pixel[i] = static_cast<const uint8_t*>(p.a.data) + place.image * s.image_stride + place.y * s.row_stride +
                 place.x * s.pixel_stride + in_window;
      columns |= bits_inside(s.kernel_w, place.x, s.dilation_w, s.width) << i;
      rows |= bits_inside(s.kernel_h, place.y, s.dilation_h, s.height) << i;
    }
    rows = row < s.kernel_h ? rows >> row * kBits : 0;
    enter_tap();
  }
  // Copies the slice that next() has come to, which is `ahead` slices further than the last call of advance().
  __device__ void whole(int stage, int ahead) const {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i)
      ptx::cp_async_16_or_zeros(to + stage * kRows * kSliceK + i * Share::kStep * kSliceK, pixel[i] + ahead * kSliceK,
                                inside, 1 << i);
  }
  // Of a slice that is not whole, what is beyond K has no tap.
  __device__ void masked(int stage, int ahead) const { whole(stage, ahead); }
  // On to the next slice. Behind the products of another: a branch before them keeps the loads of their operands behind
  // it, and the model's A100 takes 45 us instead of 36 for 3 x 3 of 256 channels (64 images of 14 x 14).
  __device__ void next() {
    channel += kSliceK;
    if (channel < windows.channels) return;
    int64_t distance = 0;
    do {
      channel -= windows.channels;
      distance += next_tap();
    } while (channel >= windows.channels);
    move(distance);
  }
  __device__ void advance(int slices) {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) pixel[i] += slices * kSliceK;
    left -= slices;
  }

  // Rounds are of taps that are whole slices, so that all threads come to a tap's end together.
  __device__ int in_rounds(int slices) const { return windows.channels % kSliceK ? 0 : slices; }
  __device__ void begin_rounds(int64_t k) {
    left = tap_slices() - static_cast<int>(k) / kSliceK % max(tap_slices(), 1);
  }
  __device__ void next_in_round(int ahead) {
    while (left == ahead + 1) {
      left += tap_slices();
      move(next_tap());
    }
  }
  __device__ void end_rounds(const GemmArguments&, int64_t, int64_t k, int64_t, uint8_t*) {
    channel = (static_cast<int>(k) + Share::chunk() * 16) % windows.channels;
  }

 private:
  __device__ int tap_slices() const { return windows.channels / kSliceK; }
  // A bit for each of `taps` from `first` on, `step` apart, that is below `size`.
  __device__ static uint64_t bits_inside(int taps, int first, int step, int size) {
    uint64_t bits = 0;
#pragma unroll 1
    for (int tap = 0; tap < taps; ++tap, first += step)
      bits |= uint64_t{static_cast<uint32_t>(first) < static_cast<uint32_t>(size)} << tap * kBits;
    return bits;
  }
  // On to the next tap; how far away it is, from this one's end to its beginning. Behind the last row nothing is
  // inside.
  __device__ int64_t next_tap() {
    shift += kBits;
    if (shift != windows.kernel_w * kBits) return windows.to_next_tap;
    shift = 0;
    rows >>= kBits;
    return windows.to_next_tap + windows.to_next_row;
  }
  __device__ void move(int64_t distance) {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) pixel[i] += distance;
    enter_tap();
  }
  __device__ void enter_tap() { inside = static_cast<uint32_t>(columns >> shift) & static_cast<uint32_t>(rows); }
};

template <class Config>
struct WindowMainloop : MmaMainloopOf<Config, WindowCopy<Config>> {
  using MmaMainloopOf<Config, WindowCopy<Config>>::MmaMainloopOf;
  static constexpr bool kGated = false;
};

}  // namespace forwardpass
