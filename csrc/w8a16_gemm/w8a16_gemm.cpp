#include "w8a16_gemm/w8a16_gemm.h"

#include "dequant_activation/dequant_activation.h"
#include "epilogue.h"
#include "torch_ops.h"

namespace forwardpass {

// On the CPU: rows of the weight are widened to fp32 some at a time, so that they stay in the cache until oneDNN has used them.
Tensor w8a16_gemm(Backend, const Tensor& x, const Tensor& w, const Tensor& w_scale, OptionalTensor bias,
                  std::optional<std::string> activation) {
  const char* op = "w8a16_gemm";
  const Matrix xm = matrix(x, op, "x");
  DequantizeWeightParams q{};
  q.w = matrix(w, op, "w");
  STD_TORCH_CHECK(is_float(xm.dtype), op, ": x must be float16, bfloat16 or float32");
  STD_TORCH_CHECK(w.dim() == 2 && (q.w.dtype == Dtype::i8 || q.w.dtype == Dtype::e4m3) && q.w.columns == xm.columns, op,
                  ": w must be int8 or float8_e4m3fn [N, ", xm.columns, "]");
  const int64_t n = q.w.rows, groups = (xm.columns + kScaleBlock - 1) / kScaleBlock;
  const bool blocks = w_scale.dim() == 2;
  if (blocks) q.block_scale = floats(w_scale, n * groups, x, op, "w_scale");
  auto sizes = sizes_of(x);
  sizes.back() = n;
  Tensor one = contiguous_rows({1}, ScalarType::Float, x);
  torch::stable::fill_(one, 1.0);
  DequantActivationParams d{};
  OptionalTensor none;
  Tensor out;
  std::tie(out, d.epilogue) =
      epilogue(sizes, xm.rows, {one, blocks ? one : w_scale, bias, activation, x.scalar_type(), none, none, none}, x, op);
  if (xm.rows == 0) return out;

  const Tensor a = torch::stable::to(as_matrix(x, xm), ScalarType::Float);
  Tensor acc = contiguous_rows({xm.rows, n}, ScalarType::Float, x);
  constexpr int64_t kRows = 256;  // 256 rows of K = 1536 in fp32 are 1.5 MB: the second-level caches of two cores
  Tensor widened = contiguous_rows({std::min(kRows, n), xm.columns}, ScalarType::Float, x);
  q.out = static_cast<float*>(widened.mutable_data_ptr());
  for (q.first = 0; q.first < n; q.first = q.last) {
    q.last = std::min(q.first + kRows, n);
    dequantize_weight_cpu(q);
    Tensor columns = torch::stable::narrow(acc, 1, q.first, q.last - q.first);
    const Matrix rows{q.out, Dtype::f32, q.last - q.first, xm.columns, xm.columns};
    torch::stable::copy_(columns, call("aten::mm", a, transposed(widened, rows)));
  }
  d.acc = matrix(acc, op, "acc");
  dequant_activation_cpu(d);
  return out;
}

}  // namespace forwardpass
