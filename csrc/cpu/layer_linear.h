#pragma once
// What encoder_layer and decoder_layer share on a CPU: their linear layers, and what a thread needs to take a block of
// rows through these.
#include <algorithm>
#include <vector>

#include "cpu/int8_blocks.h"
#include "cpu/team.h"
#include "cpu/w8a16_gemm.h"
#include "params/affine.h"
#include "torch/check.h"

namespace forwardpass {

// A linear layer. Its input is quantised row by row, or stays as it is (weight_only).
struct LayerLinear {
  Matrix weight;             // i8 [N, K]; weight_only: or e4m3
  bool weight_only;          // then there are no sum, channel_scale and packed
  const float* scale;        // [N]; null where there is a block_scale
  const float* block_scale;  // [N, ceil(K / 128)], weight_only; or null
  const void* bias;          // [N] or null
  Dtype bias_dtype;
  const int32_t* sum;          // [N], of the weight's rows: the input has zero points; null: it has none
  const float* channel_scale;  // [K], multiplies the input first; or null
  OptionalTensor packed;       // what pack_int8_weight made of the weight, or none
};

namespace cpu {

// The most rows that a thread takes at a time, which then share copies of their sequence's keys.
constexpr int64_t kMostRows = 128;

template <class T>
T* at(const CacheLines& memory) {
  return reinterpret_cast<T*>(memory[0].bytes);
}

inline Matrix floats(const float* data, int64_t rows, int64_t columns) {
  return {data, Dtype::f32, rows, columns, columns};
}

// n elements of a float dtype as float32, and back.
void convert(const void* from, Dtype dtype, float* to, int64_t n);
void convert(const float* from, void* to, Dtype dtype, int64_t n);

// Where a linear layer's results go, and what is added to them: [rows, columns] each, rows `stride` apart.
struct Outputs {
  void* data;
  int64_t stride;
  Dtype dtype = Dtype::f32;
  const float* residual = nullptr;
  Activation activation = Activation::none;
};

// How x is quantised. A row's scale and zero point go to scale and zero_point.
QuantizeParams quantization(const LayerLinear& linear, const Matrix& x, float* scale, int32_t* zero_point);

Epilogue epilogue_of(const LayerLinear& linear, const QuantizeParams& q, const Outputs& o);

// x, f32 or of another float dtype, as W8a16Product has it, in `buffer`, of x.rows rows of floats_of(x.columns).
W8a16Product weight_only_product(const LayerLinear& linear, const Matrix& x, const Outputs& o, Dtype operand,
                                 void* buffer);
inline int64_t floats_of(int64_t columns) { return round_up(columns, kTileBytes); }

// The weights of one layer as blocks read them. Those of weight_only are read as they are.
class BlockLayer {
 public:
  // Of a weight, in the order of the layer's linear layers.
  struct Weight {
    const LayerLinear* linear;
    PackedWeight packed{};
    WeightMemory memory{};
  };

  explicit BlockLayer(const std::vector<const LayerLinear*>& linears) {
    for (const LayerLinear* linear : linears) weights_.push_back({linear});
  }

  // By all threads, in the memory of a layer of as many weights that is done; null: in new memory.
  void pack(const Int8Kernel& kernel, BlockLayer* done);

  const PackedWeight& operator[](const LayerLinear& linear) const {
    return std::find_if(weights_.begin(), weights_.end(), [&](const Weight& w) { return w.linear == &linear; })->packed;
  }

 private:
  std::vector<Weight> weights_;
};

// The products of one thread, of a block of at most 32 rows at a time.
class BlockProducts {
 public:
  // depth: the most columns that an input has. operand: what inputs are multiplied as; not i8 where all linear layers
  // are weight_only.
  BlockProducts(const Int8Kernel& kernel, int64_t depth, Dtype operand = Dtype::i8);

  // is_quantized: the call before this one quantised the same x in the same way.
  void linear(const BlockLayer& layer, const LayerLinear& linear, const Matrix& x, const Outputs& o,
              bool is_quantized = false);

 private:
  const Int8Kernel& kernel_;
  const Dtype operand_;
  CacheLines rows_, scratch_, sums_;
  float scales_[kBlockRows];
  int32_t zero_points_[kBlockRows];
};

// The int8 products of few rows, whose columns threads share. Without a kernel every product is a call of
// int8_gemm_cpu.
class FewRowsProducts {
 public:
  // depth: the most columns that an input has. x: any tensor, of the device.
  FewRowsProducts(const Int8Kernel* kernel, int64_t rows, int64_t depth, const Tensor& x);

  // Some rows of x; all of them have been before `multiply`.
  void quantize(const LayerLinear& linear, const Matrix& x, Range rows) const;
  void multiply(const LayerLinear& linear, const Matrix& x, const Outputs& o, Range columns) const;

 private:
  QuantizeParams quantization(const LayerLinear& linear, const Matrix& x) const;

  const Int8Kernel* const kernel_;
  const Tensor& tensor_;
  CacheLines scales_, zero_points_, quantized_, prepared_, corrections_;
};

}  // namespace cpu
}  // namespace forwardpass
