#include "cpu/upconvert_rows.h"
#include "cpu/w8a16_gemm.h"
#include "params/dequant_activation.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

// The epilogue for rows from `row` and columns from `column` on, a multiple of 16.
Epilogue part_from(Epilogue e, int64_t row, int64_t column) {
  if (e.b_scale_per_column) e.b_scale += column;
  if (e.bias) e.bias = static_cast<const char*>(e.bias) + column * size_of(e.bias_dtype);
  const int64_t at = row * e.out_stride + (is_gated(e.activation) ? column / 2 : column);
  e.out = static_cast<char*>(e.out) + at * size_of(e.out_dtype);
  return e;
}

}  // namespace

// A thread takes some rows of the weight (columns of the output) at a time: upconverted to fp32 they stay in its cache
// while oneDNN multiplies by them, and so does the product until the epilogue has read it.
void w8a16_gemm_cpu(const Tensor& x, const Matrix& w, const float* block_scale, const Epilogue& epilogue) {
  const Tensor a = torch::stable::to(x, ScalarType::Float);
  const int64_t m = x.size(0), n = w.rows, threads = torch::stable::get_num_threads();
  constexpr int64_t kMostColumns = 256,
                    kMostRows = 1024;  // the product of one thread: 1 MB of fp32, its second-level cache
  const int64_t chunk = std::min(kMostColumns, round_up((n + threads - 1) / threads, 16));
  torch::stable::parallel_for(0, (n + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Tensor widened = contiguous_rows({chunk, w.columns}, ScalarType::Float, x), rows = a;
    for (int64_t column = begin * chunk; column < std::min(end * chunk, n); column += chunk) {
      const int64_t columns = std::min(chunk, n - column);
      auto to = static_cast<float*>(widened.mutable_data_ptr());
      upconvert_rows({w, block_scale, column, column + columns, to});
      const Tensor b = transposed(widened, {to, Dtype::f32, columns, w.columns, w.columns});
      for (int64_t row = 0; row < m; row += kMostRows) {
        Tensor acc = call("aten::mm", torch::stable::narrow(rows, 0, row, std::min(kMostRows, m - row)), b);
        dequant_activation_cpu({matrix(acc, "w8a16_gemm", "acc"), part_from(epilogue, row, column)});
      }
    }
  });
}

}  // namespace forwardpass
