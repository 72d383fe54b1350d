#include <torch/csrc/stable/ops.h>

#include "cpu/epilogue.h"
#include "cpu/finish_rows.h"
#include "params/dequant_activation.h"

namespace forwardpass {
namespace {

template <class V>
INLINE void rows(const DequantActivationParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    auto acc = static_cast<const char*>(p.acc.data) + row * p.acc.stride * size_of(p.acc.dtype);
    if (p.acc.dtype == Dtype::i32) {
      cpu::epilogue_row<V, Dtype::i32>(p.epilogue, acc, row, p.acc.columns);
    } else {
      cpu::with_float_dtype(p.acc.dtype, [&](auto D) __attribute__((always_inline)) {
        cpu::epilogue_row<V, decltype(D)::value>(p.epilogue, acc, row, p.acc.columns);
      });
    }
  }
}

void dequant_activation_rows(const DequantActivationParams& p, int64_t first, int64_t last) {
  cpu::with_vectors(VECTOR_CODE { rows<V>(p, first, last); });
}

}  // namespace

void dequant_activation_cpu(const DequantActivationParams& p) {
  if (p.epilogue.residual || p.epilogue.group_scale) return finish_rows(p);
  torch::stable::parallel_for(0, p.acc.rows, cpu::grain(p.acc.columns),
                              [&](int64_t first, int64_t last) { dequant_activation_rows(p, first, last); });
}

}  // namespace forwardpass
