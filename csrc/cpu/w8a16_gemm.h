#pragma once
#include "params/gemm.h"
#include "torch/check.h"

namespace forwardpass {

// a [M, K], x as a matrix, times an 8-bit b [N, K] transposed, then the epilogue. block_scale: [N, ceil(K / 128)]
// contiguous, or null.
void w8a16_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const float* block_scale,
                    const Epilogue& epilogue);

// x [S, K] or [E, max_m, K] times each expert's b, the rows of one of p.groups'; p.blocks.b is null or [E, N, K
// blocks].
void w8a16_grouped_gemm_cpu(const Tensor& x, const GemmParams& p);

// What they are made of: the columns from `first`, a multiple of 16, to `last`, and their epilogue.
struct W8a16Product {
  const float* a;  // [rows, K], rows `stride` elements apart, zero from K to the next multiple of 16 on
  int64_t rows, stride;
  Matrix b;
  const float* block_scale;
  Epilogue epilogue;

  // Rows up to which few_rows takes less time than many_rows.
  static int64_t most_few_rows(Dtype b);
  void few_rows(int64_t first, int64_t last) const;
  // By a copy of those rows of b in fp32, in `buffer`, of at least as many rows [.., K]. x: as a, rows of any stride.
  void many_rows(Tensor x, int64_t first, int64_t last, const Tensor& buffer) const;
};

// Rows of a from `first` to `last` as W8a16Product has them.
void rows_to_fp32(const Matrix& a, int64_t first, int64_t last, float* to, int64_t stride);

}  // namespace forwardpass
