#include "dequant_activation/dequant_activation.h"
#include "int8_operands.h"
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

}  // namespace forwardpass
