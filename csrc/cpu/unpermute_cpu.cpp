#include <torch/csrc/stable/ops.h>

#include "cpu/vector.h"
#include "params/unpermute.h"

namespace forwardpass {
namespace {

template <class V, Dtype D, Dtype W>
INLINE void tokens(const UnpermuteParams& p, int64_t first, int64_t last) {
  const int64_t columns = p.y.columns;
  for (int64_t token = first; token < last; ++token) {
    const int32_t* position = p.position + token * p.choices;
    char* out = static_cast<char*>(p.out) + token * columns * size_of(D);
    cpu::for_each_vector<V>(
        0, columns, VECTOR_BODY(&) {
          V sum{};
          for (int32_t i = 0; i < p.choices; ++i) {
            if (position[i] < 0 || position[i] >= p.y.rows) continue;
            const float weight = cpu::load<typename cpu::Vectors<4>::f32, W>(p.weights, token * p.choices + i, 1)[0];
            const char* y = static_cast<const char*>(p.y.data) + position[i] * p.y.stride * size_of(D);
            sum += weight * cpu::load<V, D>(y, c, n);
          }
          cpu::store<D>(sum, out, c, n);
        });
  }
}

void unpermute_tokens(const UnpermuteParams& p, int64_t first, int64_t last) {
  cpu::with_vectors(VECTOR_CODE {
    cpu::with_float_dtype(p.y.dtype, [&](auto D) __attribute__((always_inline)) {
      if (p.weights_dtype == Dtype::f32) return tokens<V, D(), Dtype::f32>(p, first, last);
      tokens<V, D(), D()>(p, first, last);
    });
  });
}

}  // namespace

void unpermute_cpu(const UnpermuteParams& p) {
  torch::stable::parallel_for(0, p.tokens, cpu::grain(p.y.columns * (p.choices + 1)),
                              [&](int64_t first, int64_t last) { unpermute_tokens(p, first, last); });
}

}  // namespace forwardpass
