// cuBLAS's names (_cublas.a, which `build` links for -lcublas): products, and what sets them up.
#include "gemm.h"

using namespace gpuless::standin;
using namespace gpuless::standin::cublas;

struct cublasContext {
  cudaStream_t stream = nullptr;
  int math = 0, pointers = 0, atomics = 0;
};
using Handle = cublasContext*;

namespace {

constexpr int kFloat = 68, kDouble = 70;  // compute types

// All products have these arguments, of one type or of several.
struct Arguments {
  int operation_a, operation_b;
  int64_t m, n, k;
  const void* alpha;
  Matrix a, b;
  const void* beta;
  Matrix c;
  int64_t batch;
  int compute;
};

int product(const char* name, Handle handle, const Arguments& x) {
  if (!handle) return kNotInitialized;
  Product p;
  p.m = x.m, p.n = x.n, p.k = x.k, p.batch = x.batch;
  p.operation_a = x.operation_a, p.operation_b = x.operation_b, p.compute = x.compute;
  p.alpha = x.alpha, p.beta = x.beta;
  p.a = x.a, p.b = x.b, p.c = x.c, p.d = x.c;
  return multiply(name, p, handle->stream);
}

// y = alpha * op(a) * x + beta * y as the row y = x * op(a), whose elements are one increment apart.
int by_vector(const char* name, Handle handle, int operation, int64_t rows, int64_t columns, const void* alpha,
              const Matrix& a, const Matrix& x, const void* beta, const Matrix& y, int compute) {
  if (x.ld < 1 || y.ld < 1) return refuse(name, "an increment below 1");
  const bool normal = operation == kNormal;
  return product(name, handle,
                 {kNormal, normal ? kTransposed : kNormal, 1, normal ? rows : columns, normal ? columns : rows, alpha,
                  x, a, beta, y, 1, compute});
}

}  // namespace

extern "C" {

int cublasCreate_v2(Handle* handle) {
  *handle = new cublasContext;
  return kSuccess;
}
int cublasDestroy_v2(Handle handle) {
  delete handle;
  return handle ? kSuccess : kNotInitialized;
}
int cublasGetVersion_v2(Handle, int* version) {
  *version = 130000;
  return kSuccess;
}
int cublasSetStream_v2(Handle handle, cudaStream_t stream) {
  handle->stream = stream;
  return kSuccess;
}
int cublasGetStream_v2(Handle handle, cudaStream_t* stream) {
  *stream = handle->stream;
  return kSuccess;
}
int cublasSetWorkspace_v2(Handle handle, void*, size_t) { return handle ? kSuccess : kNotInitialized; }
int cublasSetMathMode(Handle handle, int mode) {
  handle->math = mode;
  return kSuccess;
}
int cublasGetMathMode(Handle handle, int* mode) {
  *mode = handle->math;
  return kSuccess;
}
int cublasSetPointerMode_v2(Handle handle, int mode) {  // memory is one here: scalars are read wherever they are
  handle->pointers = mode;
  return kSuccess;
}
int cublasGetPointerMode_v2(Handle handle, int* mode) {
  *mode = handle->pointers;
  return kSuccess;
}
int cublasSetAtomicsMode(Handle handle, int mode) {
  handle->atomics = mode;
  return kSuccess;
}
const char* cublasGetStatusName(int status) {
  switch (status) {
    case kSuccess:
      return "CUBLAS_STATUS_SUCCESS";
    case kNotInitialized:
      return "CUBLAS_STATUS_NOT_INITIALIZED";
    case kInvalidValue:
      return "CUBLAS_STATUS_INVALID_VALUE";
    case kExecutionFailed:
      return "CUBLAS_STATUS_EXECUTION_FAILED";
    case kNotSupported:
      return "CUBLAS_STATUS_NOT_SUPPORTED";
    default:
      return "unknown";
  }
}
const char* cublasGetStatusString(int status) { return cublasGetStatusName(status); }
const char* cublasLtGetStatusName(int status) { return cublasGetStatusName(status); }
const char* cublasLtGetStatusString(int status) { return cublasGetStatusName(status); }

int cublasSgemm_v2(Handle handle, int ta, int tb, int m, int n, int k, const float* alpha, const float* a, int lda,
                   const float* b, int ldb, const float* beta, float* c, int ldc) {
  return product(
      "cublasSgemm", handle,
      {ta, tb, m, n, k, alpha, {a, CUDA_R_32F, lda}, {b, CUDA_R_32F, ldb}, beta, {c, CUDA_R_32F, ldc}, 1, kFloat});
}
int cublasDgemm_v2(Handle handle, int ta, int tb, int m, int n, int k, const double* alpha, const double* a, int lda,
                   const double* b, int ldb, const double* beta, double* c, int ldc) {
  return product(
      "cublasDgemm", handle,
      {ta, tb, m, n, k, alpha, {a, CUDA_R_64F, lda}, {b, CUDA_R_64F, ldb}, beta, {c, CUDA_R_64F, ldc}, 1, kDouble});
}
int cublasSgemmStridedBatched(Handle handle, int ta, int tb, int m, int n, int k, const float* alpha, const float* a,
                              int lda, long long stride_a, const float* b, int ldb, long long stride_b,
                              const float* beta, float* c, int ldc, long long stride_c, int batch) {
  return product("cublasSgemmStridedBatched", handle,
                 {ta,
                  tb,
                  m,
                  n,
                  k,
                  alpha,
                  {a, CUDA_R_32F, lda, stride_a},
                  {b, CUDA_R_32F, ldb, stride_b},
                  beta,
                  {c, CUDA_R_32F, ldc, stride_c},
                  batch,
                  kFloat});
}
int cublasGemmEx(Handle handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                 cudaDataType_t type_a, int lda, const void* b, cudaDataType_t type_b, int ldb, const void* beta,
                 void* c, cudaDataType_t type_c, int ldc, int compute, int) {
  return product("cublasGemmEx", handle,
                 {ta, tb, m, n, k, alpha, {a, type_a, lda}, {b, type_b, ldb}, beta, {c, type_c, ldc}, 1, compute});
}
int cublasGemmStridedBatchedEx(Handle handle, int ta, int tb, int m, int n, int k, const void* alpha, const void* a,
                               cudaDataType_t type_a, int lda, long long stride_a, const void* b, cudaDataType_t type_b,
                               int ldb, long long stride_b, const void* beta, void* c, cudaDataType_t type_c, int ldc,
                               long long stride_c, int batch, int compute, int) {
  return product("cublasGemmStridedBatchedEx", handle,
                 {ta,
                  tb,
                  m,
                  n,
                  k,
                  alpha,
                  {a, type_a, lda, stride_a},
                  {b, type_b, ldb, stride_b},
                  beta,
                  {c, type_c, ldc, stride_c},
                  batch,
                  compute});
}
int cublasSgemv_v2(Handle handle, int operation, int m, int n, const float* alpha, const float* a, int lda,
                   const float* x, int step_x, const float* beta, float* y, int step_y) {
  return by_vector("cublasSgemv", handle, operation, m, n, alpha, {a, CUDA_R_32F, lda}, {x, CUDA_R_32F, step_x}, beta,
                   {y, CUDA_R_32F, step_y}, kFloat);
}

}  // extern "C"
