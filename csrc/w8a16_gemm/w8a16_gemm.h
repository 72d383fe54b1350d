#pragma once
#include "common/params.h"

namespace forwardpass {

// rows [first, last) of an 8-bit weight [N, K] -> fp32, times its block scales [N, groups] of 128 columns where it has
// them
struct DequantizeWeightParams {
  Matrix w;                  // i8 or e4m3
  const float* block_scale;  // [N, groups], contiguous, or null
  int64_t first, last;
  float* out;  // [last - first, K], contiguous
};

constexpr int64_t kScaleBlock = 128;

void dequantize_weight_cpu(const DequantizeWeightParams& p);

}  // namespace forwardpass
