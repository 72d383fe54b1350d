#pragma once
#include "params/common.h"

namespace forwardpass {

// Rows [first, last) of an 8-bit weight [N, K] -> fp32, times the scales of their blocks where they have them.
struct WidenedRows {
  Matrix w;                  // i8 or e4m3
  const float* block_scale;  // [N, blocks], contiguous, or null
  int64_t first, last;
  float* out;  // [last - first, K], contiguous
};

void widen_rows(const WidenedRows& p);

}  // namespace forwardpass
