#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/activation.h"
#include "cpu/quantize_rows.h"
#include "params/activation_quantize.h"

namespace forwardpass {
namespace {

// x[c, c + n) through an ungated activation, or the gate's activation times up.
template <class V, Dtype D, class F>
INLINE V load_activated(const ActivationQuantizeParams& p, F activate, const void* x, int64_t c, int n) {
  if (!is_gated(p.activation)) return activate(cpu::load<V, D>(x, c, n));
  if (p.interleaved) return cpu::gated<V, D>(activate, x, c, n);
  return activate(cpu::load<V, D>(x, c, n)) * cpu::load<V, D>(x, p.out.columns + c, n);
}

// The activated row goes to a buffer, which stays in L1 or L2: quantisation reads its values twice.
template <class V>
INLINE void activate_row(const ActivationQuantizeParams& p, int64_t row, float* y) {
  cpu::with_activation(p.activation, [&](auto activate) __attribute__((always_inline)) {
    cpu::with_float_dtype(p.x.dtype, [&](auto D) __attribute__((always_inline)) {
      const char* x = static_cast<const char*>(p.x.data) + row * p.x.stride * size_of(D);
      cpu::for_each_vector<V>(
          0, p.out.columns,
          VECTOR_BODY(&) { cpu::store<Dtype::f32>(load_activated<V, D()>(p, activate, x, c, n), y, c, n); });
    });
  });
}

void activation_quantize_rows(const ActivationQuantizeParams& p, int64_t first, int64_t last) {
  std::vector<float> buffer(p.out.columns);
  float* y = buffer.data();
  cpu::with_vectors(VECTOR_CODE {
    for (int64_t row = first; row < last; ++row) {
      activate_row<V>(p, row, y);
      cpu::quantize_buffer<V>(p.out, row, y);
    }
  });
}

}  // namespace

void activation_quantize_cpu(const ActivationQuantizeParams& p) {
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns),
                              [&](int64_t first, int64_t last) { activation_quantize_rows(p, first, last); });
}

}  // namespace forwardpass
