#pragma once
#include "params/common.h"

namespace forwardpass {

// Upconverts rows [first, last) of an 8-bit weight [N, K] to fp32, times their block scales if there are any.
struct UpconvertedRows {
  Matrix w;                  // i8 or e4m3
  const float* block_scale;  // [N, blocks], contiguous, or null
  int64_t first, last;
  float* out;  // [last - first, K], contiguous
};

void upconvert_rows(const UpconvertedRows& p);

}  // namespace forwardpass
