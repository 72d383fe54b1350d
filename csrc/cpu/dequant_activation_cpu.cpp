#include <torch/csrc/stable/ops.h>

#include "cpu/epilogue.h"
#include "cpu/quantize_outputs.h"
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

void dequant_activation_rows(const DequantActivationParams& p, int64_t first, int64_t last) {
  if (p.epilogue.residual) {
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
