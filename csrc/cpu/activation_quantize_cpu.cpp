#include <torch/csrc/stable/ops.h>

#include <vector>

#include "activation_quantize/activation_quantize.h"
#include "cpu/activation.h"
#include "cpu/quantize_rows.h"

namespace forwardpass {
namespace {

using cpu::f32x16;

// x[c, c + n) of a plain activation, or the product with its up projection.
template <Dtype D>
INLINE f32x16 activated(const ActivationQuantizeParams& p, const void* x, int64_t c, int n) {
  if (!is_gated(p.activation)) return cpu::activate(p.activation, cpu::load<D>(x, c, n));
  if (!p.interleaved) return cpu::activate(p.activation, cpu::load<D>(x, c, n)) * cpu::load<D>(x, p.out.columns + c, n);
  // 16 columns are two blocks of 8 + 8 elements; n is 16, or 8 where the row ends
  const f32x16 low = cpu::load<D>(x, 2 * c), high = cpu::load<D>(x, 2 * c + 16, 2 * n - 16);
  const f32x16 gate = __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23);
  const f32x16 up = __builtin_shufflevector(low, high, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
  return cpu::activate(p.activation, gate) * up;
}

// The activated row is kept (in L1 or L2), as the quantisation reads its values twice.
template <Dtype D>
INLINE void rows(const ActivationQuantizeParams& p, int64_t first, int64_t last) {
  std::vector<float> kept(p.out.columns);
  float* y = kept.data();
  for (int64_t row = first; row < last; ++row) {
    const char* x = static_cast<const char*>(p.x.data) + row * p.x.stride * size_of(D);
    cpu::for_each_vector(
        0, p.out.columns, VECTOR_BODY(&) { cpu::store<Dtype::f32>(activated<D>(p, x, c, n), y, c, n); });
    cpu::quantize_row(p.out, row, VECTOR_BODY(=) { return cpu::load<Dtype::f32>(y, c, n); });
  }
}

CLONES void activation_quantize_rows(const ActivationQuantizeParams& p, int64_t first, int64_t last) {
  cpu::with_float_dtype(p.x.dtype, [&](auto D) __attribute__((always_inline)) { rows<D()>(p, first, last); });
}

}  // namespace

void activation_quantize_cpu(const ActivationQuantizeParams& p) {
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns),
                              [&](int64_t first, int64_t last) { activation_quantize_rows(p, first, last); });
}

}  // namespace forwardpass
