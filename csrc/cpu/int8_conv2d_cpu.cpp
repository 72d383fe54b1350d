// int8_conv2d on a CPU: the int8 GEMM, each of whose rows is gathered from x at the taps of an output pixel. A block of
// rows stays in a core's caches, so that nothing of the size of im2col is in memory.
#include <algorithm>
#include <cstring>
#include <functional>
#include <vector>

#include "cpu/int8_depthwise.h"
#include "cpu/int8_kernel.h"
#include "cpu/row_chunks.h"
#include "torch/int8_operands.h"

namespace forwardpass {
namespace {

// Copies n bytes in pieces of 16, the last of which may begin in the one before. memcpy, which takes a call for each of
// a block's 32 rows, took as long for 16 channels as half of their product.
inline void copy(uint8_t* to, const uint8_t* from, int64_t n) {
  constexpr int64_t kPiece = 16;
  if (n < kPiece || n > 32 * kPiece) return static_cast<void>(std::memcpy(to, from, n));
  for (int64_t i = 0; i + kPiece <= n; i += kPiece) std::memcpy(to + i, from + i, kPiece);
  if (n % kPiece) std::memcpy(to + n - kPiece, from + n - kPiece, kPiece);
}

// Rows of the product's a for one group: row `pixel` is x at the taps of that output pixel.
class Taps {
 public:
  Taps(const Int8Conv2dParams& p, int64_t group)
      : s_(p.shape),
        channels_(s_.group_channels()),
        x_(reinterpret_cast<const uint8_t*>(p.x) + group * channels_),
        rows_are_dense_(s_.dilation_w == 1 && s_.pixel_stride == channels_),
        are_pixels_(s_.is_gemm()) {}

  void load(int64_t first, int64_t count, uint8_t* to, int64_t stride) const {
    if (are_pixels_) {
      const uint8_t* from = x_ + first * s_.pixel_stride;
      for (int64_t i = 0; i < count; ++i) copy(to + i * stride, from + i * s_.pixel_stride, channels_);
      return;
    }
    int64_t w = first % s_.out_width, h = first / s_.out_width % s_.out_height,
            image = first / (s_.out_width * s_.out_height);
    for (int64_t i = 0; i < count; ++i, to += stride) {
      pixel(x_ + image * s_.image_stride, h * s_.stride_h - s_.padding_h, w * s_.stride_w - s_.padding_w, to);
      if (++w < s_.out_width) continue;
      w = 0;
      if (++h < s_.out_height) continue;
      h = 0, ++image;
    }
  }

 private:
  // The taps from (top, left) of an image on.
  void pixel(const uint8_t* x, int64_t top, int64_t left, uint8_t* to) const {
    const int64_t row_bytes = s_.kernel_w * channels_;
    for (int64_t r = 0; r < s_.kernel_h; ++r, to += row_bytes) {
      const int64_t h = top + r * s_.dilation_h;
      if (h < 0 || h >= s_.height) {
        std::memset(to, 0, row_bytes);
      } else if (rows_are_dense_) {
        dense_row(x + h * s_.row_stride, left, to);
      } else {
        row(x + h * s_.row_stride, left, to);
      }
    }
  }
  // The taps of a row whose bytes lie beside one another.
  void dense_row(const uint8_t* x, int64_t left, uint8_t* to) const {
    const int64_t begin = std::clamp<int64_t>(-left, 0, s_.kernel_w),
                  end = std::clamp<int64_t>(s_.width - left, begin, s_.kernel_w);
    if (begin) std::memset(to, 0, begin * channels_);
    if (end > begin) copy(to + begin * channels_, x + (left + begin) * channels_, (end - begin) * channels_);
    if (end < s_.kernel_w) std::memset(to + end * channels_, 0, (s_.kernel_w - end) * channels_);
  }
  void row(const uint8_t* x, int64_t left, uint8_t* to) const {
    for (int64_t c = 0, w = left; c < s_.kernel_w; ++c, w += s_.dilation_w, to += channels_) {
      if (w < 0 || w >= s_.width) {
        std::memset(to, 0, channels_);
      } else {
        copy(to, x + w * s_.pixel_stride, channels_);
      }
    }
  }

  const Conv2dShape& s_;
  const int64_t channels_;
  const uint8_t* x_;
  const bool rows_are_dense_;  // all channels are this group's, and a row's taps follow one another
  const bool are_pixels_;      // rows lie in x, pixel_stride apart
};

}  // namespace

void int8_conv2d_cpu(const Tensor& x, const Int8Conv2dParams& p, OptionalTensorRef packed) {
  const int64_t m = p.shape.out_pixels(), k = p.w.columns, columns = p.w.rows / p.shape.groups;
  Epilogue all = p.epilogue;
  std::vector<float> scales(p.scale_per_image ? m : 0);
  if (p.scale_per_image) {
    const int64_t pixels = m / p.shape.images;
    for (int64_t i = 0; i < m; ++i) scales[i] = all.a_scale[i / pixels];
    all.a_scale = scales.data(), all.a_scale_per_row = true;
  }
  if (p.shape.groups > 1 && p.shape.groups == p.shape.channels && columns == 1) {
    Int8Conv2dParams of_rows = p;
    of_rows.epilogue = all;
    return int8_depthwise_cpu(of_rows);
  }
  const cpu::Int8Kernel* kernel = cpu::int8_kernel(cpu::tier());
  for (int64_t group = 0; group < p.shape.groups; ++group) {
    const Taps taps(p, group);
    const auto load = [&](int64_t first, int64_t count, uint8_t* to, int64_t stride) {
      taps.load(first, count, to, stride);
    };
    Matrix w = p.w;
    w.data = static_cast<const int8_t*>(w.data) + group * columns * w.stride, w.rows = columns;
    const Epilogue e = columns_from(all, group * columns);
    if (kernel) {
      const bool whole = packed && p.shape.groups == 1;  // packed is all of w
      const auto data = static_cast<const uint8_t*>(whole ? packed->const_data_ptr() : nullptr);
      cpu::int8_product(*kernel, {m, k, std::ref(load)}, {w, data, whole ? packed->numel() : 0}, e);
      continue;
    }
    // torch multiplies matrices that are in memory: as many rows at a time as are some MB.
    const int64_t rows_at_once = std::clamp<int64_t>((1 << 22) / k, 1, m);
    const Tensor rows = contiguous_rows({rows_at_once, k}, ScalarType::Char, x);
    const auto data = static_cast<uint8_t*>(rows.mutable_data_ptr());
    for (int64_t first = 0; first < m; first += rows_at_once) {
      const int64_t count = std::min(rows_at_once, m - first);
      taps.load(first, count, data, k);
      int8_gemm_cpu(rows, {data, Dtype::i8, count, k, k}, w, rows_from(e, first), nullptr);
    }
  }
}

}  // namespace forwardpass
