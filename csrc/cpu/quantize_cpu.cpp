#include <torch/csrc/stable/ops.h>

#include "cpu/quantize_rows.h"
#include "quantize/quantize.h"

namespace forwardpass {
namespace {

template <Dtype D>
INLINE void rows(const QuantizeParams& p, int64_t first, int64_t last) {
  using T = typename cpu::Type<D>::type;
  for (int64_t row = first; row < last; ++row) {
    auto x = static_cast<const T*>(p.x.data) + row * p.x.stride;
    for (int64_t group = 0; group * p.out.group < p.out.columns; ++group)
      cpu::quantize_segment(p.out, row, group, [x](int64_t c) __attribute__((always_inline)) { return cpu::to_float(x[c]); });
  }
}

CLONES void quantize_rows(const QuantizeParams& p, int64_t first, int64_t last) {
  switch (p.x.dtype) {
    case Dtype::f32: return rows<Dtype::f32>(p, first, last);
    case Dtype::f16: return rows<Dtype::f16>(p, first, last);
    default: return rows<Dtype::bf16>(p, first, last);
  }
}

}  // namespace

void quantize_cpu(const QuantizeParams& p) {
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns), [&](int64_t first, int64_t last) { quantize_rows(p, first, last); });
}

}  // namespace forwardpass
