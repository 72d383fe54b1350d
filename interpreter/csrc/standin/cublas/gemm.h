#pragma once
// The product behind cuBLAS's and cuBLASLt's functions, on the host: no kernel runs and nothing is checked but bounds.
// By names of our own, as cuBLAS's headers are no part of the CUDA toolkit that this is built with.
#include <cstdint>

#include "standin/standin.h"

namespace gpuless::standin::cublas {

// cublasStatus_t, of those that are returned here.
enum Status { kSuccess = 0, kNotInitialized = 1, kInvalidValue = 7, kExecutionFailed = 13, kNotSupported = 15 };
// cublasOperation_t; the conjugate of a real matrix is the matrix.
enum Operation { kNormal = 0, kTransposed = 1, kConjugated = 2 };
// cublasComputeType_t; the FAST ones may round their operands on a GPU, here they do not.
constexpr bool is_float(int compute) { return compute == 68 || compute == 69 || (compute >= 74 && compute <= 78); }
constexpr bool is_double(int compute) { return compute == 70 || compute == 71; }
constexpr bool is_integer(int compute) { return compute == 72 || compute == 73; }

// Columns are `ld` elements apart, matrices of a batch `stride`.
struct Matrix {
  const void* data = nullptr;
  cudaDataType_t type = CUDA_R_32F;
  int64_t ld = 0, stride = 0;
};

struct Product {  // d = activation(alpha * op(a) * op(b) + beta * c + bias), m x n, by columns
  int64_t m = 0, n = 0, k = 0, batch = 1;
  int operation_a = kNormal, operation_b = kNormal, compute = 0;
  const void *alpha = nullptr, *beta = nullptr;  // of the type that the products are added in
  Matrix a, b, c, d;
  enum Activation { none, relu, gelu, gelu_gradient } activation = none;
  Matrix bias;  // m values
  Matrix aux;   // what goes into gelu is kept in it, and read by its gradient
};

// Puts it into the stream, done there or kept for a graph. A cublasStatus_t: what cannot be done is said on stderr.
int multiply(const char* name, const Product&, cudaStream_t);

// Says on stderr what is not supported; kNotSupported.
int refuse(const char* name, const char* what);

}  // namespace gpuless::standin::cublas
