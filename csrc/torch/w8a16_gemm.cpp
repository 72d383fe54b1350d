#include "params/w8a16_gemm.h"

#include "cpu/w8a16_gemm.h"
#include "torch/epilogue.h"
#include "torch/gemm.h"
#include "torch/torch_ops.h"

namespace forwardpass {

Tensor w8a16_gemm(Backend backend, const Tensor& x, const Tensor& w, const Tensor& w_scale, OptionalTensor bias,
                  std::optional<std::string> activation) {
  const char* op = "w8a16_gemm";
  const Matrix xm = matrix(x, op, "x"), wm = matrix(w, op, "w");
  STD_TORCH_CHECK(is_float(xm.dtype), op, ": x must be float16, bfloat16 or float32");
  STD_TORCH_CHECK(backend == Backend::cpu || xm.dtype != Dtype::f32, op, ": on a GPU x must be float16 or bfloat16");
  STD_TORCH_CHECK(w.dim() == 2 && (wm.dtype == Dtype::i8 || wm.dtype == Dtype::e4m3) && wm.columns == xm.columns, op,
                  ": w must be int8 or float8_e4m3fn [N, ", xm.columns, "]");
  const bool blocks = w_scale.dim() == 2;
  const float* block_scale =
      blocks ? floats(w_scale, wm.rows * ceil_div(xm.columns, kScaleBlock), x, op, "w_scale") : nullptr;
  auto sizes = sizes_of(x);
  sizes.back() = wm.rows;
  const OptionalTensor none;
  auto [out, e] = epilogue(
      sizes, xm.rows,
      {none, blocks ? none : OptionalTensor(w_scale), bias, activation, x.scalar_type(), none, none, none}, x, op);
  if (backend != Backend::cpu) {
    run_gemm<W8a16GemmParams>(backend, {xm, wm, {nullptr, 0, block_scale, 0}, e, {}, nullptr, 0}, x);
  } else if (out.numel()) {
    w8a16_gemm_cpu(as_matrix(x, xm), wm, block_scale, e);
  }
  return out;
}

}  // namespace forwardpass
