#pragma once
#include "params/common.h"

namespace forwardpass {

// Rows [first, last) of a GEMM's 8-bit b [N, K], as fp32, times their block scales if there are any.
struct UpconvertRowsParams {
  Matrix b;                  // i8 or e4m3
  const float* block_scale;  // [N, blocks], contiguous, or null
  int64_t first, last;
  float* out;  // [last - first, K], contiguous
};

void upconvert_rows(const UpconvertRowsParams& p);

}  // namespace forwardpass
