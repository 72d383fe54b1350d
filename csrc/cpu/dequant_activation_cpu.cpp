#include <torch/csrc/stable/ops.h>

#include "cpu/epilogue.h"
#include "cpu/quantize_outputs.h"
#include "cpu/row_chunks.h"
#include "params/dequant_activation.h"

namespace forwardpass {
namespace {

// The dtype of the accumulators is asked for in each block: four copies of all that follows took 28 s to compile.
template <class V, bool kResidual>
INLINE void rows(const DequantActivationParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    auto acc = static_cast<const char*>(p.acc.data) + row * p.acc.stride * size_of(p.acc.dtype);
    cpu::epilogue_blocks<V, kResidual>(p.epilogue, row, p.acc.columns,
                                       [&](int64_t c, int64_t n, float* y) __attribute__((always_inline)) {
                                         if (p.acc.dtype == Dtype::i32)
                                           return cpu::dequantize<V, Dtype::i32>(p.epilogue, acc, row, c, n, y);
                                         cpu::with_float_dtype(p.acc.dtype, [&](auto D) __attribute__((always_inline)) {
                                           cpu::dequantize<V, decltype(D)::value>(p.epilogue, acc, row, c, n, y);
                                         });
                                       });
  }
}

// Rows from which on it pays to prepare what the columns have.
constexpr int64_t kLeastClamped = 4;

void dequant_activation_rows(const DequantActivationParams& p, int64_t first, int64_t last) {
  if (last - first >= kLeastClamped && cpu::is_clamped(p.epilogue, p.acc.dtype)) {
    const auto acc = static_cast<const int32_t*>(p.acc.data) + first * p.acc.stride;
    const Epilogue e = rows_from(p.epilogue, first);
    cpu::with_vectors(VECTOR_CODE { cpu::clamped_rows<V>(e, acc, p.acc.stride, last - first, p.acc.columns); });
  } else if (p.epilogue.residual) {
    cpu::with_vectors(VECTOR_CODE { rows<V, true>(p, first, last); });
  } else {
    cpu::with_vectors(VECTOR_CODE { rows<V, false>(p, first, last); });
  }
}

}  // namespace

void dequant_activation_cpu(const DequantActivationParams& p) {
  if (p.epilogue.group_scale) return quantize_outputs(p);
  torch::stable::parallel_for(0, p.acc.rows, cpu::grain(p.acc.columns),
                              [&](int64_t first, int64_t last) { dequant_activation_rows(p, first, last); });
}

}  // namespace forwardpass
