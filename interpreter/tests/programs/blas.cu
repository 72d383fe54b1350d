// cuBLAS's stand-in against sums in double, over layouts, types, batches and epilogues. By declarations of our own, as
// a CUDA toolkit need not have cuBLAS's headers; the numbers are cuBLAS's.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <library_types.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

extern "C" {
int cublasCreate_v2(void**);
int cublasDestroy_v2(void*);
int cublasSetStream_v2(void*, cudaStream_t);
int cublasSgemm_v2(void*, int, int, int, int, int, const float*, const float*, int, const float*, int, const float*,
                   float*, int);
int cublasSgemv_v2(void*, int, int, int, const float*, const float*, int, const float*, int, const float*, float*, int);
int cublasGemmStridedBatchedEx(void*, int, int, int, int, int, const void*, const void*, cudaDataType, int, long long,
                               const void*, cudaDataType, int, long long, const void*, void*, cudaDataType, int,
                               long long, int, int, int);
int cublasLtCreate(void**);
int cublasLtMatrixLayoutCreate(void**, cudaDataType, size_t, size_t, long long);
int cublasLtMatrixLayoutSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmulDescCreate(void**, int, cudaDataType);
int cublasLtMatmulDescSetAttribute(void*, int, const void*, size_t);
int cublasLtMatmul(void*, void*, const void*, const void*, void*, const void*, void*, const void*, const void*, void*,
                   void*, void*, const void*, void*, size_t, cudaStream_t);
}

int failures = 0;
#define EXPECT(condition)                                           \
  do {                                                              \
    if (!(condition)) {                                             \
      std::printf("line %d: %s is not so\n", __LINE__, #condition); \
      ++failures;                                                   \
    }                                                               \
  } while (0)

template <class T>
constexpr cudaDataType type_of();
template <>
constexpr cudaDataType type_of<float>() {
  return CUDA_R_32F;
}
template <>
constexpr cudaDataType type_of<double>() {
  return CUDA_R_64F;
}
template <>
constexpr cudaDataType type_of<__half>() {
  return CUDA_R_16F;
}
template <>
constexpr cudaDataType type_of<__nv_bfloat16>() {
  return CUDA_R_16BF;
}
template <>
constexpr cudaDataType type_of<signed char>() {
  return CUDA_R_8I;
}
template <>
constexpr cudaDataType type_of<int>() {
  return CUDA_R_32I;
}

template <class T>
T* filled(size_t count) {
  T* p;
  cudaMallocManaged(&p, count * sizeof(T));
  for (size_t i = 0; i < count; ++i) p[i] = T(float(std::rand() % 65 - 32) / (sizeof(T) == 1 ? 1 : 16));
  return p;
}

double gelu(double x) { return 0.5 * x * (1 + std::tanh(std::sqrt(2 / M_PI) * (x + 0.044715 * x * x * x))); }
double gelu_gradient(double x) { return (gelu(x + 1e-5) - gelu(x - 1e-5)) / 2e-5; }

double element(const auto* x, int ld, bool transposed, int row, int column) {
  return double(float(transposed ? x[column + row * ld] : x[row + column * ld]));
}

void* blas;
void* lt;

template <class In, class Out, class Scalar>
void products(int compute, double tolerance) {
  for (int m : {1, 5, 64, 67})
    for (int n : {1, 4, 9})
      for (int k : {1, 33})
        for (int ta : {0, 1, 2})
          for (int tb : {0, 1})
            for (float beta_value : {0.f, 2.f}) {
              constexpr int kBatch = 2;
              const int lda = (ta ? k : m) + 3, ldb = (tb ? n : k) + 1, ldc = m + 2;
              const int step_a = lda * (ta ? m : k), step_b = ldb * (tb ? k : n), step_c = ldc * n;
              In *a = filled<In>(step_a * kBatch), *b = filled<In>(step_b * kBatch);
              Out* c = filled<Out>(step_c * kBatch);
              std::vector<Out> before(c, c + step_c * kBatch);
              if (beta_value == 0) std::memset(c, 0xff, step_c * kBatch * sizeof(Out));  // NaN, which must not be read
              const Scalar alpha = Scalar(3), beta = Scalar(beta_value);
              EXPECT(!cublasGemmStridedBatchedEx(blas, ta, tb, m, n, k, &alpha, a, type_of<In>(), lda, step_a, b,
                                                 type_of<In>(), ldb, step_b, &beta, c, type_of<Out>(), ldc, step_c,
                                                 kBatch, compute, -1));
              double worst = 0;
              for (int z = 0; z < kBatch; ++z)
                for (int i = 0; i < m; ++i)
                  for (int j = 0; j < n; ++j) {
                    double sum = 0;
                    for (int l = 0; l < k; ++l)
                      sum += element(a + z * step_a, lda, ta, i, l) * element(b + z * step_b, ldb, tb, l, j);
                    sum = 3 * sum + beta_value * double(float(before[z * step_c + i + j * ldc]));
                    const double error = std::fabs(sum - double(float(c[z * step_c + i + j * ldc])));
                    worst = std::fmax(worst, error != error ? 1e9 : error / (1 + std::fabs(sum)));
                  }
              if (worst > tolerance && failures++ < 10)
                std::printf("%d x %d x %d, %d %d, beta %g: off by %g\n", m, n, k, ta, tb, beta_value, worst);
              for (void* p : {(void*)a, (void*)b, (void*)c}) cudaFree(p);
            }
}

void vectors() {
  constexpr int m = 7, n = 5, lda = 9;
  float *a = filled<float>(lda * n), *x = filled<float>(2 * 8), *y = filled<float>(3 * 8);
  const float alpha = 2, beta = 0.5;
  for (int t : {0, 1}) {
    std::vector<float> before(y, y + 24);
    EXPECT(!cublasSgemv_v2(blas, t, m, n, &alpha, a, lda, x, 2, &beta, y, 3));
    for (int i = 0; i < (t ? n : m); ++i) {
      double sum = 0;
      for (int l = 0; l < (t ? m : n); ++l) sum += element(a, lda, t, i, l) * x[2 * l];
      EXPECT(std::fabs(y[3 * i] - (2 * sum + 0.5 * before[3 * i])) < 1e-4);
      EXPECT(y[3 * i + 1] == before[3 * i + 1]);
    }
  }
}

void epilogues() {
  constexpr int m = 70, n = 6, k = 40;
  float *a = filled<float>(m * k), *b = filled<float>(k * n), *bias = filled<float>(m), *aux = filled<float>(m * n), *d;
  cudaMallocManaged(&d, m * n * 4);
  void *description, *layout_a, *layout_b, *layout_d;
  EXPECT(!cublasLtMatrixLayoutCreate(&layout_a, CUDA_R_32F, k, m, k));
  EXPECT(!cublasLtMatrixLayoutCreate(&layout_b, CUDA_R_32F, k, n, k));
  EXPECT(!cublasLtMatrixLayoutCreate(&layout_d, CUDA_R_32F, m, n, m));
  for (int epilogue : {1, 2, 4, 6, 32, 36, 160, 164, 192, 512}) {
    EXPECT(!cublasLtMatmulDescCreate(&description, 68, CUDA_R_32F));
    const int transposed = 1;
    const long long ld = m;
    const float alpha = 0.25, beta = 0;
    EXPECT(!cublasLtMatmulDescSetAttribute(description, 3, &transposed, 4));
    EXPECT(!cublasLtMatmulDescSetAttribute(description, 7, &epilogue, 4));
    EXPECT(!cublasLtMatmulDescSetAttribute(description, 8, &bias, 8));
    EXPECT(!cublasLtMatmulDescSetAttribute(description, 11, &aux, 8));
    EXPECT(!cublasLtMatmulDescSetAttribute(description, 12, &ld, 8));
    const std::vector<float> before(aux, aux + m * n);
    const int error = cublasLtMatmul(lt, description, &alpha, a, layout_a, b, layout_b, &beta, d, layout_d, d, layout_d,
                                     nullptr, nullptr, 0, nullptr);
    EXPECT(error == (epilogue == 512 ? 15 : 0));
    if (error) continue;
    for (int i = 0; i < m; ++i)
      for (int j = 0; j < n; ++j) {
        double sum = 0;
        for (int l = 0; l < k; ++l) sum += element(a, k, true, i, l) * element(b, k, false, l, j);
        sum = 0.25 * sum + (epilogue & 4 ? bias[i] : 0);
        if (epilogue & 128 && epilogue & 32) EXPECT(std::fabs(aux[i + j * m] - sum) < 1e-4);
        if (epilogue & 2) sum = std::fmax(sum, 0);
        if (epilogue & 32) sum = gelu(sum);
        if (epilogue & 64) sum *= gelu_gradient(before[i + j * m]);
        if (std::fabs(d[i + j * m] - sum) > 1e-3 && failures++ < 10)
          std::printf("epilogue %d: %g, not %g\n", epilogue, d[i + j * m], sum);
      }
  }
}

void captured() {
  cudaStream_t stream;
  cudaGraph_t graph;
  cudaGraphExec_t executable;
  float *a = filled<float>(4), *c = filled<float>(4);
  const float before = c[0], one = 1, zero = 0;
  cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
  EXPECT(!cublasSetStream_v2(blas, stream));
  EXPECT(!cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  EXPECT(!cublasSgemm_v2(blas, 0, 0, 2, 2, 2, &one, a, 2, a, 2, &zero, c, 2));
  EXPECT(!cudaStreamEndCapture(stream, &graph));
  EXPECT(c[0] == before);
  EXPECT(!cudaGraphInstantiate(&executable, graph, 0));
  EXPECT(!cudaGraphLaunch(executable, stream));
  EXPECT(c[0] == a[0] * a[0] + a[2] * a[1]);
}

void refused() {
  float *a = filled<float>(16), *c = filled<float>(16);
  const float one = 1;
  EXPECT(cublasSgemm_v2(nullptr, 0, 0, 4, 4, 4, &one, a, 4, a, 4, &one, c, 4) == 1);
  EXPECT(cublasSgemm_v2(blas, 0, 0, 4, 4, 4, &one, a, 3, a, 4, &one, c, 4) == 7);  // ld below the rows
  EXPECT(cublasSgemm_v2(blas, 0, 0, 4, 5, 4, &one, a, 4, a, 4, &one, c, 4) == 7);  // beyond the end
  EXPECT(cublasGemmStridedBatchedEx(blas, 0, 0, 4, 4, 4, &one, a, CUDA_C_32F, 4, 16, a, CUDA_R_32F, 4, 16, &one, c,
                                    CUDA_R_32F, 4, 16, 1, 68, -1) == 15);
  EXPECT(cublasGemmStridedBatchedEx(blas, 0, 0, 4, 4, 4, &one, a, CUDA_R_16F, 4, 16, a, CUDA_R_16F, 4, 16, &one, c,
                                    CUDA_R_16F, 4, 16, 1, 64, -1) == 15);  // sums in half
}

int main() {
  EXPECT(!cublasCreate_v2(&blas));
  EXPECT(!cublasLtCreate(&lt));
  products<float, float, float>(77, 1e-5);
  products<double, double, double>(70, 1e-6);
  products<__half, __half, float>(68, 6e-4);
  products<__nv_bfloat16, __nv_bfloat16, float>(68, 5e-3);
  products<__nv_bfloat16, float, float>(68, 1e-5);
  products<signed char, int, int>(72, 0);
  vectors();
  epilogues();
  captured();
  refused();
  EXPECT(!cublasDestroy_v2(blas));
  std::printf("%s\n", failures ? "FAIL" : "PASS");
  return failures != 0;
}
