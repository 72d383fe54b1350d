#include <algorithm>
#include <cstring>

#include "cpu/int8_tiers.h"
#include "cpu/row_chunks.h"
#include "cpu/upconvert_rows.h"
#include "cpu/vector.h"
#include "params/dequant_activation.h"
#include "torch/int8_operands.h"
#include "torch/torch_ops.h"

namespace forwardpass {
namespace {

// Adds fp32 sums, which are integers, to acc; the first ones replace what is there.
CLONES void add_to(int32_t* acc, int64_t stride, const float* part, int64_t rows, int64_t columns, bool first) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c)
      acc[r * stride + c] = (first ? 0 : acc[r * stride + c]) + static_cast<int32_t>(part[r * columns + c]);
}

// By sgemm, which is exact: sums of 1024 int8 products are integers of at most 2^24, in any order. On one core of an
// AVX2 EPYC 128 x 384 times 384 x 1536 takes 78 ms by _int_mm, 2.1 ms by sgemm.
Tensor multiply_as_floats(const Tensor& a, const Tensor& b_transposed) {
  constexpr int64_t kDepth = 1024, kColumns = 256;  // b upconverted: 1 MB
  const int64_t m = a.size(0), k = a.size(1), n = b_transposed.size(1), stride = b_transposed.stride(1);
  Tensor acc = contiguous_rows({m, n}, ScalarType::Int, a), a_fp32 = torch::stable::to(a, ScalarType::Float),
         b_fp32 = contiguous_rows({std::min(kColumns, n), std::min(kDepth, k)}, ScalarType::Float, a);
  auto out = static_cast<int32_t*>(acc.mutable_data_ptr());
  auto to = static_cast<float*>(b_fp32.mutable_data_ptr());
  for (int64_t d = 0; d < k; d += kDepth) {
    const int64_t depth = std::min(kDepth, k - d);
    const Matrix b{static_cast<const int8_t*>(b_transposed.const_data_ptr()) + d, Dtype::i8, n, depth, stride};
    const Tensor a_columns = torch::stable::narrow(a_fp32, 1, d, depth);
    for (int64_t c = 0; c < n; c += kColumns) {
      const int64_t columns = std::min(kColumns, n - c);
      upconvert_rows({b, nullptr, c, c + columns, to});
      const Tensor part = call("aten::mm", a_columns, transposed(b_fp32, {to, Dtype::f32, columns, depth, depth}));
      add_to(out + c, n, static_cast<const float*>(part.const_data_ptr()), m, columns, d == 0);
    }
  }
  return acc;
}

// Whether oneDNN's kernel is exact. Where ONEDNN_MAX_CPU_ISA denies it VNNI, it saturates the 16-bit sums of two
// products, which the product of the largest values shows.
bool int_mm_is_exact(const Tensor& like) {
  constexpr int64_t kRows = 16, kDepth = 64;
  Tensor largest = contiguous_rows({kRows, kDepth}, ScalarType::Char, like);
  std::memset(largest.mutable_data_ptr(), 127, kRows * kDepth);
  const Tensor sums = call("aten::_int_mm", largest, view(largest, kDepth, kRows, 1, kDepth));
  const auto sum = static_cast<const int32_t*>(sums.const_data_ptr());
  return std::all_of(sum, sum + kRows * kRows, [](int32_t s) { return s == 127 * 127 * kDepth; });
}

// int8_amx reads all of b for every 32 rows, so that a larger one does not stay in L2. Its time on one thread, as a
// fraction of oneDNN's, with 1024 rows of a: 0.55 where b is 384 x 384, 0.5 for 384 x 1536 and 768 x 768, 0.95 for 768
// x 3072, 1.1 for 1024 x 4096. With fewer rows than a block packing b for it does not pay.
constexpr int64_t kAmxMinRows = 32, kAmxMaxElements = 1 << 20;

}  // namespace

void int8_gemm_cpu(const Tensor& a, const Tensor& b_transposed, const Epilogue& epilogue,
                   const QuantizeParams* quantize) {
  const int64_t m = a.size(0), k = a.size(1), n = b_transposed.size(1);
  const Matrix a_matrix = matrix(a, "int8_gemm", "a"),
               b{b_transposed.const_data_ptr(), Dtype::i8, n, k, b_transposed.stride(1)};
  const bool use_amx = m >= kAmxMinRows && has_amx_int8();
  if (use_amx && n * k <= kAmxMaxElements) return int8_amx(a_matrix, b, epilogue, quantize);
  static const bool exact = has_amx_int8() && int_mm_is_exact(a);
  const bool use_int_mm = use_amx && exact;
  if (!use_int_mm && has_vnni()) return int8_vnni(a_matrix, b, epilogue, quantize);
  if (!use_int_mm && has_avx2()) return int8_avx2(a_matrix, b, epilogue, quantize);
  auto rows = [&](int64_t first, int64_t count) {
    if (quantize) quantize_cpu(rows_from(*quantize, first, count));
    Tensor all_rows = a;  // narrow takes a non-const reference
    const Tensor chunk = torch::stable::narrow(all_rows, 0, first, count);
    const Tensor acc =
        use_int_mm ? call("aten::_int_mm", chunk, b_transposed) : multiply_as_floats(chunk, b_transposed);
    dequant_activation_cpu({matrix(acc, "int8_gemm", "acc"), rows_from(epilogue, first)});
  };
  // With enough rows for every thread, each takes a chunk of rows through all three passes while it is in the thread's
  // cache. oneDNN packs b on each call, and a call costs about 20 us, which 128 rows hide for a small b and 512 for a
  // large one (one EPYC 9005 core: 0.47 of 0.51 TMAC/s at 384 x 1536, 0.45 at 4096 x 4096). With fewer rows the threads
  // share each pass. All 36 GEMMs of MiniLM with 8 x 128 tokens on two threads take 16.2 ms in chunks of 256 rows, 15.4
  // ms in chunks of 512.
  const int64_t threads = torch::stable::get_num_threads(), rows_per_thread = (m + threads - 1) / threads;
  constexpr int64_t kMaxChunk = 512;
  if (rows_per_thread < (n * k <= (1 << 21) ? 128 : kMaxChunk)) return rows(0, m);
  const int64_t chunks_per_thread = (rows_per_thread + kMaxChunk - 1) / kMaxChunk,
                chunk = (rows_per_thread + chunks_per_thread - 1) / chunks_per_thread;
  torch::stable::parallel_for(0, (m + chunk - 1) / chunk, 1, [&](int64_t first, int64_t last) {
    for (int64_t c = first; c < last; ++c) rows(c * chunk, std::min(chunk, m - c * chunk));
  });
}

}  // namespace forwardpass
