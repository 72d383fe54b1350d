#include <torch/csrc/stable/ops.h>

#include "cpu/epilogue.h"
#include "cpu/quantize_outputs.h"
#include "cpu/row_chunks.h"
#include "params/dequant_activation.h"

namespace forwardpass {
namespace {

template <class V, bool kResidual>
INLINE void rows(const DequantActivationParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    auto acc = static_cast<const char*>(p.acc.data) + row * p.acc.stride * size_of(p.acc.dtype);
    if (p.acc.dtype == Dtype::i32) {
      cpu::epilogue_row<V, Dtype::i32, kResidual>(p.epilogue, acc, row, p.acc.columns);
    } else {
      cpu::with_float_dtype(p.acc.dtype, [&](auto D) __attribute__((always_inline)) {
        cpu::epilogue_row<V, decltype(D)::value, kResidual>(p.epilogue, acc, row, p.acc.columns);
      });
    }
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
