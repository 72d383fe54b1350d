#include <algorithm>

#include "cpu/int8_kernel.h"
#include "cpu/upconvert_rows.h"
#include "params/dequant_activation.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

// Adds fp32 sums, which are integers, to acc; the first ones replace what is there.
void add_to(int32_t* acc, int64_t stride, const float* part, int64_t rows, int64_t columns, bool first) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      acc[r * stride + c] = (first ? 0 : acc[r * stride + c]) + static_cast<int32_t>(part[r * columns + c]);
}

// By sgemm, which is exact: sums of 1024 int8 products are integers of at most 2^24, in any order. On one core of an
// AVX2 EPYC 128 x 384 times 384 x 1536 takes 78 ms by _int_mm, 2.1 ms by sgemm.
Tensor multiply_as_floats(const Tensor& a, const Matrix& b) {
  constexpr int64_t kDepth = 1024, kColumns = 256;  // b upconverted: 1 MB
  const int64_t m = a.size(0), k = a.size(1), n = b.rows;
  Tensor acc = contiguous_rows({m, n}, ScalarType::Int, a), a_fp32 = torch::stable::to(a, ScalarType::Float),
         b_fp32 = contiguous_rows({std::min(kColumns, n), std::min(kDepth, k)}, ScalarType::Float, a);
  auto out = static_cast<int32_t*>(acc.mutable_data_ptr());
  auto to = static_cast<float*>(b_fp32.mutable_data_ptr());
  for (int64_t d = 0; d < k; d += kDepth) {
    const int64_t depth = std::min(kDepth, k - d);
    const Matrix b_columns{static_cast<const int8_t*>(b.data) + d, Dtype::i8, n, depth, b.stride};
    const Tensor a_columns = torch::stable::narrow(a_fp32, 1, d, depth);
    for (int64_t c = 0; c < n; c += kColumns) {
      const int64_t columns = std::min(kColumns, n - c);
      upconvert_rows({b_columns, nullptr, c, c + columns, to});
      const Tensor part = call("aten::mm", a_columns, transposed(b_fp32, {to, Dtype::f32, columns, depth, depth}));
      add_to(out + c, n, static_cast<const float*>(part.const_data_ptr()), m, columns, d == 0);
    }
  }
  return acc;
}

// Rows of a from `first` on, int8, to `to`: copied or, with `quantize`, made of x.
void load_rows(const Matrix& a, const QuantizeParams* quantize, int64_t first, int64_t count, uint8_t* to,
               int64_t stride) {
  if (quantize) {
    QuantizeParams q = rows_from(*quantize, first, count);
    q.out.q = to, q.out.q_stride = stride;
    return quantize_cpu(q);
  }
  auto from = static_cast<const uint8_t*>(a.data) + first * a.stride;
  for (int64_t i = 0; i < count; ++i) std::memcpy(to + i * stride, from + i * a.stride, a.columns);
}

Tensor quantized(QuantizeParams quantize, const Tensor& x) {
  const Tensor q = padded_rows({quantize.x.rows, quantize.x.columns}, ScalarType::Char, 1, x);
  quantize.out.q = q.mutable_data_ptr();
  quantize.out.q_stride = q.stride(0);
  quantize_cpu(quantize);
  return q;
}

}  // namespace

bool int8_gemm_has_whole_rows(const Matrix& a) {
  const cpu::Int8Kernel* kernel = cpu::int8_kernel(cpu::tier());
  return kernel && a.rows > kernel->few_rows_unpacked;  // of few rows threads share the columns
}

void int8_gemm_cpu(const Tensor& x, const Matrix& a, const Matrix& b, const Epilogue& epilogue,
                   const QuantizeParams* quantize, OptionalTensorRef packed) {
  if (const cpu::Int8Kernel* kernel = cpu::int8_kernel(cpu::tier())) {
    const auto data = static_cast<const uint8_t*>(packed ? packed->const_data_ptr() : nullptr);
    const auto load = [&](int64_t first, int64_t count, uint8_t* to, int64_t stride) {
      load_rows(a, quantize, first, count, to, stride);
    };
    return cpu::int8_product(*kernel, {a.rows, a.columns, std::ref(load)}, {b, data, packed ? packed->numel() : 0},
                             epilogue);
  }
  const Tensor q = quantize ? quantized(*quantize, x) : as_matrix(x, a);
  dequant_activation_cpu({matrix(multiply_as_floats(q, b), "int8_gemm", "acc"), epilogue});
}

}  // namespace forwardpass
