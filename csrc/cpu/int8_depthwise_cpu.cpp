// int8_conv2d on a CPU where each channel is a group: no product of matrices, as sums are over taps alone.
//
// vpmaddwd adds two products of 16 bits to 32, exactly. So two neighbouring pixels of a channel, widened, are the two
// halves of a lane: a row of the image becomes a row of pairs, once, and every window that covers it reads it. An
// output that begins at the second pixel of a pair takes weights that are one tap later, with a zero before them. For 3
// x 3, an output of 16 channels is six vpmaddwd, six additions and the widening, about one instruction for two outputs;
// bytes do not bind: an image of 32 channels and 112 x 112 pixels has 0.4 MB. vpmaddubsw would take half as many and
// saturates; vpdpbusd wants four taps of a channel side by side, which AVX2 lacks and interleaving would cost.
#include <algorithm>
#include <cstring>
#include <vector>

#include "cpu/int8_depthwise.h"
#include "cpu/memory.h"
#include "cpu/row_chunks.h"
#include "cpu/vector.h"
#include "torch/check.h"
#include "torch/ops.h"

namespace forwardpass {
namespace {

// Channels that go through a row together: a line of x. Rows of the output that a thread takes at a time.
constexpr int64_t kChannels = 64, kBandRows = 16;

// Sums of two products of 16 bits in each lane.
template <class I>
INLINE I pair_products(I a, I b) {
#if defined(__x86_64__)
  if constexpr (sizeof(I) > 16) {
    I products;
    asm("vpmaddwd %2, %1, %0" : "=v"(products) : "v"(a), "vm"(b));
    return products;
  }
#endif
  return (a << 16 >> 16) * (b << 16 >> 16) + (a >> 16) * (b >> 16);
}

INLINE int32_t pair_of(int low, int high) { return (low & 0xffff) | static_cast<int32_t>(uint32_t(high) << 16); }

// What all channels have: where windows lie in a row of pairs.
struct Windows {
  int64_t width, height;      // of a window, dilated
  int64_t pairs;              // of a row, padded
  int64_t rows;               // of pairs that are kept
  int64_t phases, pair_step;  // of outputs: every `phases`-th begins at the same half of a pair, pair_step pairs later

  explicit Windows(const Conv2dShape& s)
      : width((s.kernel_w - 1) * s.dilation_w + 1),
        height((s.kernel_h - 1) * s.dilation_h + 1),
        pairs(((s.out_width - 1) * s.stride_w + width) / 2 + 1),
        rows(std::min(height, s.height)),
        phases(1 + s.stride_w % 2),
        pair_step(phases * s.stride_w / 2) {}
  int64_t taps(int64_t phase) const { return (width + phase + 1) / 2; }  // pairs of a window's row
};

// One chunk of a vector's channels.
template <class V>
class Chunk {
 public:
  using I = cpu::Ints<V>;
  static constexpr int64_t kLanes = cpu::kLanes<V>;

  static int64_t bytes(const Windows& windows, int64_t kernel_h) {
    return ((windows.rows + 1) * windows.pairs + kernel_h * (windows.taps(0) + windows.taps(1))) * sizeof(I);
  }
  Chunk(const Int8Conv2dParams& p, const Windows& windows, int64_t channel, uint8_t* memory)
      : s_(p.shape),
        windows_(windows),
        x_(p.x + channel),
        channels_(static_cast<int>(std::min(kLanes, s_.channels - channel))),
        pairs_(reinterpret_cast<int32_t*>(memory)),
        weights_(pairs_ + (windows.rows + 1) * windows.pairs * kLanes),
        row_in_slot_(windows.rows, -1) {
    std::memset(zeros(), 0, windows.pairs * sizeof(I));
    const auto w = static_cast<const int8_t*>(p.w.data) + channel * p.w.stride;
    std::memset(weights_, 0, s_.kernel_h * (windows.taps(0) + windows.taps(1)) * sizeof(I));
    for (int64_t phase = 0; phase < 2; ++phase)
      for (int64_t tap = 0; tap < s_.kernel_h * s_.kernel_w; ++tap) {
        const int64_t r = tap / s_.kernel_w, column = tap % s_.kernel_w * s_.dilation_w + phase;
        auto to = reinterpret_cast<int16_t*>(weights(phase) + (r * windows.taps(phase) + column / 2) * kLanes);
        for (int64_t c = 0; c < channels_; ++c) to[c * 2 + column % 2] = w[c * p.w.stride + tap];
      }
  }

  // sums [out_width], `stride` apart, of row `h` of an image's output.
  INLINE void multiply_row(int64_t image, int64_t h, int32_t* sums, int64_t stride) {
    std::vector<const int32_t*>& rows = rows_;
    rows.clear();
    for (int64_t r = 0; r < s_.kernel_h; ++r)
      rows.push_back(row_of_pairs(image, h * s_.stride_h - s_.padding_h + r * s_.dilation_h));
    for (int64_t phase = 0; phase < windows_.phases; ++phase) {
      int64_t w = phase;
      for (; w + 3 * windows_.phases < s_.out_width; w += 4 * windows_.phases)
        multiply<4>(phase, w, sums + w * stride, windows_.phases * stride);
      for (; w < s_.out_width; w += windows_.phases) multiply<1>(phase, w, sums + w * stride, 0);
    }
  }

 private:
  // Outputs w, w + phases, ... w + (kOutputs - 1) * phases.
  template <int kOutputs>
  INLINE void multiply(int64_t phase, int64_t w, int32_t* sums, int64_t stride) const {
    const int64_t first = w * s_.stride_w / 2 * kLanes, step = windows_.pair_step * kLanes, taps = windows_.taps(phase);
    const int32_t* weight = weights(phase);
    I acc[kOutputs] = {};
    for (const int32_t* row : rows_)
      for (int64_t tap = 0; tap < taps; ++tap, weight += kLanes) {
        const I b = cpu::load_bits<I>(weight, kLanes);
        const int32_t* a = row + first + tap * kLanes;
        cpu::unrolled<kOutputs>(
            UNROLLED_BODY(i) { acc[i] += pair_products(b, cpu::load_bits<I>(a + i * step, kLanes)); });
      }
    cpu::unrolled<kOutputs>(UNROLLED_BODY(i) { cpu::store_bits(acc[i], sums + i * stride, kLanes); });
  }

  // Row h of x as pairs, zeros outside.
  INLINE const int32_t* row_of_pairs(int64_t image, int64_t h) {
    if (h < 0 || h >= s_.height) return zeros();
    const int64_t slot = h % windows_.rows, row = image * s_.height + h;
    int32_t* to = pairs_ + slot * windows_.pairs * kLanes;
    if (row_in_slot_[slot] == row) return to;
    row_in_slot_[slot] = row;
    const int64_t from = image * s_.image_stride + h * s_.row_stride;
    int64_t left = -s_.padding_w;
    for (int64_t i = 0; i < windows_.pairs; ++i, left += 2) {
      const I low = pixel(x_ + from, left), high = pixel(x_ + from, left + 1);
      cpu::store_bits((low & 0xffff) | (high << 16), to + i * kLanes, kLanes);
    }
    return to;
  }
  INLINE I pixel(const int8_t* row, int64_t w) const {
    if (w < 0 || w >= s_.width) return I{};
    return cpu::widen<I>(cpu::load_bits<cpu::Chars<V>>(row + w * s_.pixel_stride, channels_));
  }

  int32_t* zeros() const { return pairs_ + windows_.rows * windows_.pairs * kLanes; }
  int32_t* weights(int64_t phase) const { return weights_ + phase * s_.kernel_h * windows_.taps(0) * kLanes; }

  const Conv2dShape& s_;
  const Windows& windows_;
  const int8_t* x_;
  const int channels_;
  int32_t *pairs_, *weights_;
  std::vector<int64_t> row_in_slot_;    // which row of which image is in a slot
  std::vector<const int32_t*> rows_{};  // of pairs, a window's
};

// Rows `first` to `last` of the output of `image`, channels from `channel` on.
template <class V>
INLINE void convolve(const Int8Conv2dParams& p, const Windows& windows, int64_t image, int64_t channel, int64_t first,
                     int64_t last) {
  const Conv2dShape& s = p.shape;
  const int64_t columns = std::min(kChannels, s.channels - channel);
  const int64_t chunks = (columns + cpu::kLanes<V> - 1) / cpu::kLanes<V>, stride = chunks * cpu::kLanes<V>;
  const int64_t bytes = round_up(Chunk<V>::bytes(windows, s.kernel_h), 64);
  const cpu::CacheLines memory = cpu::allocate(bytes * chunks), buffer = cpu::allocate(s.out_width * stride * 4);
  auto sums = reinterpret_cast<int32_t*>(buffer[0].bytes);
  std::vector<Chunk<V>> of_vectors;
  for (int64_t i = 0; i < chunks; ++i)
    of_vectors.emplace_back(p, windows, channel + i * cpu::kLanes<V>, memory[0].bytes + i * bytes);
  for (int64_t h = first; h < last; ++h) {
    for (int64_t i = 0; i < chunks; ++i) of_vectors[i].multiply_row(image, h, sums + i * cpu::kLanes<V>, stride);
    const Epilogue e = columns_from(rows_from(p.epilogue, (image * s.out_height + h) * s.out_width), channel);
    dequant_activation_cpu({{sums, Dtype::i32, s.out_width, columns, stride}, e});
  }
}

}  // namespace

void int8_depthwise_cpu(const Int8Conv2dParams& p) {
  const Windows windows(p.shape);
  const int64_t bands = (p.shape.out_height + kBandRows - 1) / kBandRows,
                parts = (p.shape.channels + kChannels - 1) / kChannels;
  // Channels of a band follow one another, so that x's rows are in a cache.
  torch::stable::parallel_for(0, p.shape.images * bands * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t band = i / parts % bands, first = band * kBandRows;
      cpu::with_vectors(VECTOR_CODE {
        convolve<V>(p, windows, i / (parts * bands), i % parts * kChannels, first,
                    std::min(first + kBandRows, p.shape.out_height));
      });
    }
  });
}

}  // namespace forwardpass
