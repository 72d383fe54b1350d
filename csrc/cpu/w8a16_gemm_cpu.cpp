#include <torch/csrc/stable/ops.h>

#include "cpu/vector.h"
#include "w8a16_gemm/w8a16_gemm.h"

namespace forwardpass {
namespace {

template <Dtype D>
INLINE void rows(const DequantizeWeightParams& p, int64_t first, int64_t last) {
  const int64_t k = p.w.columns, groups = (k + kScaleBlock - 1) / kScaleBlock;
  for (int64_t row = first; row < last; ++row) {
    auto w = static_cast<const int8_t*>(p.w.data) + row * p.w.stride;
    float* out = p.out + (row - p.first) * k;
    for (int64_t group = 0; group < groups; ++group) {
      const int64_t begin = group * kScaleBlock, end = begin + kScaleBlock < k ? begin + kScaleBlock : k;
      const float scale = p.block_scale ? p.block_scale[row * groups + group] : 1.0f;
      cpu::for_each_vector(
          begin, end, VECTOR_BODY(&) { cpu::store<Dtype::f32>(cpu::load<D>(w, c, n) * scale, out, c, n); });
    }
  }
}

CLONES void dequantize_weight_rows(const DequantizeWeightParams& p, int64_t first, int64_t last) {
  if (p.w.dtype == Dtype::i8) return rows<Dtype::i8>(p, first, last);
  rows<Dtype::e4m3>(p, first, last);
}

}  // namespace

void dequantize_weight_cpu(const DequantizeWeightParams& p) {
  torch::stable::parallel_for(p.first, p.last, cpu::grain(p.w.columns),
                              [&](int64_t first, int64_t last) { dequantize_weight_rows(p, first, last); });
}

}  // namespace forwardpass
