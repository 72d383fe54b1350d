#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/activation.h"
#include "cpu/quantize_rows.h"
#include "cpu/vector.h"
#include "params/activation_quantize.h"

namespace forwardpass {

// The activated row goes to a buffer, which stays in L1 or L2: quantisation reads its values twice.
void activation_quantize_cpu(const ActivationQuantizeParams& p) {
  const int64_t size = size_of(p.x.dtype), columns = p.out.columns;
  const bool halves = is_gated(p.activation) && !p.interleaved;
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns), [&](int64_t first, int64_t last) {
    std::vector<float> buffer(columns);
    for (int64_t row = first; row < last; ++row) {
      const char* x = static_cast<const char*>(p.x.data) + row * p.x.stride * size;
      cpu::activate({p.activation, p.x.dtype, x, halves ? x + columns * size : nullptr}, columns, buffer.data());
      quantize_to_row(buffer.data(), Dtype::f32, p.out, row);
    }
  });
}

}  // namespace forwardpass
