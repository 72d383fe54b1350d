#include <torch/csrc/stable/ops.h>

#include "cpu/quantize_rows.h"
#include "params/quantize.h"

namespace forwardpass {
namespace {

template <class V, Dtype D>
INLINE void rows(const QuantizeParams& p, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(p.x.data) + row * p.x.stride * size_of(D);
    cpu::quantize_row<V>(p.out, row, VECTOR_BODY(=) { return cpu::load<V, D>(x, c, n); });
  }
}

void quantize_rows(const QuantizeParams& p, int64_t first, int64_t last) {
  cpu::with_vectors(VECTOR_CODE {
    cpu::with_float_dtype(p.x.dtype, [&](auto D) __attribute__((always_inline)) { rows<V, D()>(p, first, last); });
  });
}

}  // namespace

void quantize_cpu(const QuantizeParams& p) {
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns),
                              [&](int64_t first, int64_t last) { quantize_rows(p, first, last); });
}

}  // namespace forwardpass
