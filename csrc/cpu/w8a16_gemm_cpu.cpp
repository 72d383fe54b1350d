#include "cpu/row_chunks.h"
#include "cpu/upconvert_rows.h"
#include "cpu/w8a16_gemm.h"
#include "params/dequant_activation.h"
#include "torch/torch_ops.h"

namespace forwardpass {
// A thread takes some rows of b (columns of the output) at a time. They are upconverted to fp32 and stay in its cache
// while oneDNN multiplies by them; so does the product until the epilogue has read it.
void w8a16_gemm_cpu(const Tensor& a, const Matrix& b, const float* block_scale, const Epilogue& epilogue) {
  const Tensor a_fp32 = torch::stable::to(a, ScalarType::Float);
  const int64_t m = a.size(0), n = b.rows, threads = torch::stable::get_num_threads();
  constexpr int64_t kMaxColumns = 256,
                    kMaxRows = 1024;  // the product of one thread: 1 MB of fp32, its second-level cache
  const int64_t chunk = std::min(kMaxColumns, round_up((n + threads - 1) / threads, 16));
  torch::stable::parallel_for(0, (n + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Tensor b_fp32 = contiguous_rows({chunk, b.columns}, ScalarType::Float, a), rows = a_fp32;
    for (int64_t column = begin * chunk; column < std::min(end * chunk, n); column += chunk) {
      const int64_t columns = std::min(chunk, n - column);
      auto b_data = static_cast<float*>(b_fp32.mutable_data_ptr());
      upconvert_rows({b, block_scale, column, column + columns, b_data});
      const Tensor b_transposed = transposed(b_fp32, {b_data, Dtype::f32, columns, b.columns, b.columns});
      for (int64_t row = 0; row < m; row += kMaxRows) {
        Tensor acc = call("aten::mm", torch::stable::narrow(rows, 0, row, std::min(kMaxRows, m - row)), b_transposed);
        dequant_activation_cpu({matrix(acc, "w8a16_gemm", "acc"), columns_from(rows_from(epilogue, row), column)});
      }
    }
  });
}

}  // namespace forwardpass
