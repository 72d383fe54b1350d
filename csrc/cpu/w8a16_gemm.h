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
  Matrix a;  // of float32 or bfloat16, zero from K to the next multiple of kDepth on
  Matrix b;
  const float* block_scale;
  Epilogue epilogue;

  static constexpr int64_t kDepth = 32;

  // What `rows` rows of x's dtype are multiplied as: bfloat16 where one instruction adds two products of them, and 8
  // bits are bfloat16 without loss; but of few rows the time is that of reading b, which each conversion prolongs.
  static Dtype operand(Dtype x, int64_t rows);
  // Rows of float32 up to which few_rows takes less time than many_rows; of bfloat16 there is no such number.
  static int64_t most_few_rows(Dtype b);
  void few_rows(int64_t first, int64_t last) const;
  // By a copy of those rows of b in fp32, in `buffer`, of at least as many rows [.., K]. x: as a, rows of any stride.
  void many_rows(Tensor x, int64_t first, int64_t last, const Tensor& buffer) const;
};

// Rows of a from `first` on to those of `to`, which W8a16Product has as its own: [rows, K], of float32 or bfloat16.
void convert_rows(const Matrix& a, int64_t first, const Matrix& to);

}  // namespace forwardpass
