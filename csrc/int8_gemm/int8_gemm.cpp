#include "int8_gemm/int8_gemm.h"

#include "dequant_activation/dequant_activation.h"
#include "epilogue.h"
#include "torch_ops.h"

namespace forwardpass {
namespace {

QuantizeParams rows_from(QuantizeParams p, int64_t first, int64_t count) {
  p.x.data = static_cast<const char*>(p.x.data) + first * p.x.stride * size_of(p.x.dtype);
  p.x.rows = count;
  p.out.q = static_cast<char*>(p.out.q) + first * p.out.q_stride;
  if (p.out.scale) p.out.scale += first;
  if (p.out.zero_point) p.out.zero_point += first;
  return p;
}

Epilogue rows_from(Epilogue e, int64_t first) {
  if (e.a_scale_per_row) e.a_scale += first;
  if (e.zero_point_per_row) e.zero_point += first;
  e.out = static_cast<char*>(e.out) + first * e.out_stride * size_of(e.out_dtype);
  return e;
}

}  // namespace

Matrix int8_operand(const Tensor& t, const char* op, const char* name) {
  Matrix m = matrix(t, op, name);
  STD_TORCH_CHECK(m.dtype == Dtype::i8, op, ": ", name, " must be int8");
  return m;
}

void check_int8_depth(int64_t k, bool zero_point, const char* op) {
  STD_TORCH_CHECK(k <= (zero_point ? 65536 : 131072), op, ": K = ", k, " could overflow int32 accumulators");
}

void int8_gemm_cpu(const Tensor& a, const Tensor& b_transposed, const Epilogue& epilogue,
                   const QuantizeParams* quantize) {
  const int64_t m = a.size(0), k = a.size(1), n = b_transposed.size(1);
  auto rows = [&](int64_t first, int64_t count) {
    if (quantize) quantize_cpu(rows_from(*quantize, first, count));
    Tensor whole = a;  // narrow takes a reference that is not const
    Tensor acc = call("aten::_int_mm", torch::stable::narrow(whole, 0, first, count), b_transposed);
    dequant_activation_cpu({matrix(acc, "int8_gemm", "acc"), rows_from(epilogue, first)});
  };
  // With rows enough for every thread, a thread takes some of them through all three passes while they are in its
  // cache. oneDNN packs b on each call, and each call costs some 20 us, which 128 rows hide for a small b and 512 for a
  // large one (one EPYC 9005 core: 0.47 of 0.51 TMAC/s at 384 x 1536, 0.45 at 4096 x 4096). With fewer rows the threads
  // share each pass. All 36 products of MiniLM at 8 x 128 tokens, two threads: 16.2 ms in chunks of 256 rows, 15.4 of
  // 512.
  const int64_t threads = torch::stable::get_num_threads(), share = (m + threads - 1) / threads;
  constexpr int64_t kMost = 512;
  if (share < (n * k <= (1 << 21) ? 128 : kMost)) return rows(0, m);
  const int64_t each = (share + kMost - 1) / kMost, chunk = (share + each - 1) / each;
  torch::stable::parallel_for(0, (m + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) rows(c * chunk, std::min(chunk, m - c * chunk));
  });
}

Tensor int8_gemm(Backend, const Tensor& a, const Tensor& b, const Tensor& a_scale, const Tensor& b_scale,
                 OptionalTensor bias, std::optional<std::string> activation, ScalarType out_dtype,
                 OptionalTensor out_scale, OptionalTensor a_zero_point, OptionalTensor b_sum) {
  const Matrix am = int8_operand(a, "int8_gemm", "a"), bm = int8_operand(b, "int8_gemm", "b");
  STD_TORCH_CHECK(b.dim() == 2 && am.columns == bm.columns, "int8_gemm: b must be [N, ", am.columns, "]");
  check_int8_depth(am.columns, a_zero_point.has_value(), "int8_gemm");
  auto sizes = sizes_of(a);
  sizes.back() = bm.rows;
  auto [out, e] = epilogue(
      sizes, am.rows, {a_scale, b_scale, bias, activation, out_dtype, out_scale, a_zero_point, b_sum}, a, "int8_gemm");
  if (am.rows) int8_gemm_cpu(as_matrix(a, am), transposed(b, bm), e, nullptr);
  return out;
}

}  // namespace forwardpass
