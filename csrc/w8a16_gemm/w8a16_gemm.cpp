#include "w8a16_gemm/w8a16_gemm.h"

#include "dequant_activation/dequant_activation.h"
#include "epilogue.h"
#include "torch_ops.h"

namespace forwardpass {

namespace {

// The epilogue of rows from `row` and columns from `column`, a multiple of 16, on.
Epilogue part_from(Epilogue e, int64_t row, int64_t column) {
  if (e.b_scale_per_column) e.b_scale += column;
  if (e.bias) e.bias = static_cast<const char*>(e.bias) + column * size_of(e.bias_dtype);
  const int64_t at = row * e.out_stride + (is_gated(e.activation) ? column / 2 : column);
  e.out = static_cast<char*>(e.out) + at * size_of(e.out_dtype);
  return e;
}

}  // namespace

// On the CPU a thread takes some rows of the weight (some columns of the output) at a time: widened to fp32 they stay
// in its cache while oneDNN multiplies by them, and so does the product until the epilogue has read it.
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
  const OptionalTensor none;
  auto [output, epilogue_of] = epilogue(
      sizes, xm.rows,
      {none, blocks ? none : OptionalTensor(w_scale), bias, activation, x.scalar_type(), none, none, none}, x, op);
  const Tensor out = output;  // C++17 lambdas capture no structured bindings
  const Epilogue e = epilogue_of;
  if (xm.rows == 0) return out;

  const Tensor a = torch::stable::to(as_matrix(x, xm), ScalarType::Float);
  const int64_t threads = torch::stable::get_num_threads();
  constexpr int64_t kMostColumns = 256,
                    kMostRows = 1024;  // the product of one thread: 1 MB of fp32, its second-level cache
  const int64_t chunk = std::min(kMostColumns, round_up((n + threads - 1) / threads, 16));
  torch::stable::parallel_for(0, (n + chunk - 1) / chunk, 1, [&](int64_t begin, int64_t end) {
    Tensor widened = contiguous_rows({chunk, xm.columns}, ScalarType::Float, x), rows = a;
    for (int64_t column = begin * chunk; column < std::min(end * chunk, n); column += chunk) {
      const int64_t columns = std::min(chunk, n - column);
      auto out_rows = static_cast<float*>(widened.mutable_data_ptr());
      dequantize_weight_cpu({q.w, q.block_scale, column, column + columns, out_rows});
      const Tensor b = transposed(widened, {out_rows, Dtype::f32, columns, xm.columns, xm.columns});
      for (int64_t row = 0; row < xm.rows; row += kMostRows) {
        Tensor acc = call("aten::mm", torch::stable::narrow(rows, 0, row, std::min(kMostRows, xm.rows - row)), b);
        dequant_activation_cpu({matrix(acc, op, "acc"), part_from(e, row, column)});
      }
    }
  });
  return out;
}

}  // namespace forwardpass
