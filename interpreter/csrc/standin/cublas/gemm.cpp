#include "gemm.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "formats.h"

namespace gpuless::standin::cublas {
namespace {

using gpuless::BFloat16;
using gpuless::Half;

// f(pointer of the elements' type); false: there is no such type here.
template <class F>
bool with_type(const Matrix& x, F f) {
  void* data = const_cast<void*>(x.data);
  switch (x.type) {
    case CUDA_R_32F:
      return f(static_cast<float*>(data)), true;
    case CUDA_R_64F:
      return f(static_cast<double*>(data)), true;
    case CUDA_R_16F:
      return f(static_cast<Half*>(data)), true;
    case CUDA_R_16BF:
      return f(static_cast<BFloat16*>(data)), true;
    case CUDA_R_8I:
      return f(static_cast<int8_t*>(data)), true;
    case CUDA_R_32I:
      return f(static_cast<int32_t*>(data)), true;
    default:
      return false;
  }
}

template <class T>
T gelu(T x) {  // by tanh, as cuBLASLt's
  return T(0.5) * x * (1 + std::tanh(T(0.7978845608028654) * (x + T(0.044715) * x * x * x)));
}
template <class T>
T gelu_gradient(T x) {
  const T inner = T(0.7978845608028654) * (x + T(0.044715) * x * x * x), t = std::tanh(inner);
  return T(0.5) * (1 + t) + T(0.5) * x * (1 - t * t) * T(0.7978845608028654) * (1 + T(0.134145) * x * x);
}

// Rows and columns of d that are added at once.
constexpr int64_t kRows = 64, kColumns = 4;

// `width` rows of op(x) from `first` on, each value of k after the other: to[l * width + i].
template <class Sum, class T>
void pack(const T* x, int64_t ld, bool along_columns, int64_t first, int64_t rows, int64_t width, int64_t k, Sum* to) {
  for (int64_t l = 0; l < k; ++l)
    for (int64_t i = 0; i < width; ++i) {
      const int64_t row = first + i;
      to[l * width + i] = i < rows ? static_cast<Sum>(along_columns ? x[row + l * ld] : x[l + row * ld]) : Sum(0);
    }
}

template <class Sum>
void add(const Sum* a, const Sum* b, int64_t k, Sum (&sums)[kColumns][kRows]) {
  for (auto& column : sums) std::fill(column, column + kRows, Sum(0));
  for (int64_t l = 0; l < k; ++l)
    for (int64_t j = 0; j < kColumns; ++j)
      for (int64_t i = 0; i < kRows; ++i) sums[j][i] += a[l * kRows + i] * b[l * kColumns + j];
}

template <class Sum>
Sum value(const Matrix& x, int64_t batch, int64_t i, int64_t j) {
  Sum result{};
  with_type(x, [&](auto* p) { result = static_cast<Sum>(p[batch * x.stride + j * x.ld + i]); });
  return result;
}
template <class Sum>
void set(const Matrix& x, int64_t batch, int64_t i, int64_t j, Sum v) {
  with_type(x, [&]<class T>(T* p) {
    using From = std::conditional_t<gpuless::is_short<T>, std::common_type_t<Sum, float>, Sum>;
    p[batch * x.stride + j * x.ld + i] = static_cast<T>(static_cast<From>(v));
  });
}

template <class Sum>
void finish_value(const Product& p, Sum alpha, Sum beta, int64_t batch, int64_t i, int64_t j, Sum sum) {
  Sum v = alpha * sum;
  if (beta != Sum(0)) v += beta * value<Sum>(p.c, batch, i, j);  // c is not read for a beta of 0, NaN or not
  if (p.bias.data) v += value<Sum>(p.bias, batch, i, 0);
  if constexpr (!std::is_integral_v<Sum>) {
    if (p.aux.data && p.activation == Product::gelu) set(p.aux, batch, i, j, v);
    if (p.activation == Product::gelu) v = gelu(v);
    if (p.activation == Product::gelu_gradient) v *= gelu_gradient(value<Sum>(p.aux, batch, i, j));
  }
  if (p.activation == Product::relu) v = std::max(v, Sum(0));
  set(p.d, batch, i, j, v);
}

template <class Sum>
void compute(const Product& p, Sum alpha, Sum beta) {
  std::vector<Sum> rows(static_cast<size_t>(kRows * p.k)), columns(static_cast<size_t>(kColumns * p.k));
  std::vector<Sum> all_columns(static_cast<size_t>((p.n + kColumns - 1) / kColumns * kColumns * p.k));
  Sum sums[kColumns][kRows];
  for (int64_t batch = 0; batch < p.batch; ++batch) {
    with_type(p.b, [&](auto* b) {
      for (int64_t j = 0; j < p.n; j += kColumns)
        pack(b + batch * p.b.stride, p.b.ld, p.operation_b != kNormal, j, p.n - j, kColumns, p.k,
             &all_columns[j * p.k]);
    });
    for (int64_t i = 0; i < p.m; i += kRows) {
      with_type(p.a, [&](auto* a) {
        pack(a + batch * p.a.stride, p.a.ld, p.operation_a == kNormal, i, p.m - i, kRows, p.k, rows.data());
      });
      for (int64_t j = 0; j < p.n; j += kColumns) {
        add(rows.data(), &all_columns[j * p.k], p.k, sums);
        for (int64_t y = 0; y < std::min(kColumns, p.n - j); ++y)
          for (int64_t x = 0; x < std::min(kRows, p.m - i); ++x)
            finish_value(p, alpha, beta, batch, i + x, j + y, sums[y][x]);
      }
    }
  }
}

// Whether all of a batch lies in memory that the GPU may touch.
bool reachable(const Matrix& x, int64_t rows, int64_t columns, int64_t batch) {
  if (!x.data || !rows || !columns || !batch) return true;
  int64_t size = 0;
  with_type(x, [&](auto* p) { size = sizeof *p; });
  return gpuless_storage_find(x.data, ((batch - 1) * x.stride + (columns - 1) * x.ld + rows) * size);
}

std::string problem(const Product& p) {
  const bool a_normal = p.operation_a == kNormal, b_normal = p.operation_b == kNormal;
  if (p.m < 0 || p.n < 0 || p.k < 0 || p.batch < 0) return "m, n, k and the number of matrices must not be negative";
  struct Part {
    const char* name;
    const Matrix& matrix;
    int64_t rows, columns;
  };
  for (const Part& part : {Part{"a", p.a, a_normal ? p.m : p.k, a_normal ? p.k : p.m},
                           Part{"b", p.b, b_normal ? p.k : p.n, b_normal ? p.n : p.k}, Part{"c", p.c, p.m, p.n},
                           Part{"d", p.d, p.m, p.n}, Part{"the bias", p.bias, p.m, 1}, Part{"aux", p.aux, p.m, p.n}}) {
    const std::string name = part.name;
    if (!part.matrix.data) continue;
    if (part.columns > 1 && part.matrix.ld < std::max<int64_t>(1, part.rows))
      return "the leading dimension of " + name + " is " + std::to_string(part.matrix.ld) + ", and it has " +
             std::to_string(part.rows) + " rows";
    if (!reachable(part.matrix, part.rows, part.columns, p.batch))
      return name + " reaches beyond the memory that was allocated";
  }
  return "";
}

template <class Sum>
int enqueue_as(const Product& p, cudaStream_t stream) {
  const Sum alpha = *static_cast<const Sum*>(p.alpha), beta = *static_cast<const Sum*>(p.beta);
  const cudaError_t error = enqueue(stream, [=] {
    compute<Sum>(p, alpha, beta);
    return finish(cudaSuccess);
  });
  return error ? kExecutionFailed : kSuccess;
}

}  // namespace

int refuse(const char* name, const char* what) {
  unsupported((std::string(name) + " with " + what).c_str());
  return kNotSupported;
}

int multiply(const char* name, const Product& p, cudaStream_t stream) {
  static std::atomic<bool> announced{false};
  if (!announced.exchange(true))
    std::fprintf(stderr, "%s is computed on the host: no kernel of cuBLAS runs, and nothing of it is checked\n", name);
  for (const Matrix* x : {&p.a, &p.b, &p.c, &p.d, &p.bias, &p.aux})
    if (!with_type(*x, [](auto*) {})) return refuse(name, ("cudaDataType_t " + std::to_string(x->type)).c_str());
  if (const std::string text = problem(p); !text.empty()) {
    std::fprintf(stderr, "%s: %s\n", name, text.c_str());
    return kInvalidValue;
  }
  if (is_float(p.compute)) return enqueue_as<float>(p, stream);
  if (is_double(p.compute)) return enqueue_as<double>(p, stream);
  if (is_integer(p.compute)) return enqueue_as<int32_t>(p, stream);
  return refuse(name, ("cublasComputeType_t " + std::to_string(p.compute)).c_str());
}

}  // namespace gpuless::standin::cublas
