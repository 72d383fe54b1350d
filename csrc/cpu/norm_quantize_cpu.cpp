#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cpu/norm_rows.h"
#include "cpu/quantize_rows.h"
#include "cpu/vector.h"
#include "params/norm_quantize.h"

namespace forwardpass {
namespace {

// In fp32 or in A. A choice among all three dtypes, here for each vector, took norms in fp32 1.15 times as long.
template <class V, Dtype A>
INLINE V load_affine(const Affine& a, int64_t c, int n) {
  return a.dtype == Dtype::f32 ? cpu::load<V, Dtype::f32>(a.data, c, n) : cpu::load<V, A>(a.data, c, n);
}

// The row's norm goes to v, [columns] floats, which stay in the cache: 16-bit values are converted once.
template <class V, Dtype D, Dtype A = D>
INLINE void norm_row(const NormQuantizeParams& p, float* v, int64_t row) {
  constexpr int64_t kSize = size_of(D);
  const int64_t columns = p.x.columns;
  const void* x = static_cast<const char*>(p.x.data) + row * p.x.stride * kSize;
  if (p.residual.data) {
    const void* residual = static_cast<const char*>(p.residual.data) + row * p.residual.stride * kSize;
    void* sum = static_cast<char*>(p.residual_out) + row * columns * kSize;
    cpu::for_each_vector<V>(
        0, columns,
        VECTOR_BODY(&) { cpu::store<D>(cpu::load<V, D>(x, c, n) + cpu::load<V, D>(residual, c, n), sum, c, n); });
    x = sum;
  }

  // A layer norm does not change when the whole row is shifted. Computed relative to the row's first value, a large
  // common offset costs no accuracy, and a constant row has variance 0 exactly.
  float mean = 0;
  if (p.kind == Norm::layer) {
    const float pivot = cpu::load<V, D>(x, 0, 1)[0];
    V sums{};
    cpu::for_each_vector<V>(
        0, columns, VECTOR_BODY(&) {
          const V shifted = cpu::first_lanes(cpu::load<V, D>(x, c, n) - pivot, n);
          cpu::store<Dtype::f32>(shifted, v, c, n);
          sums += shifted;
        });
    mean = cpu::sum(sums) / columns;
  } else {
    cpu::for_each_vector<V>(0, columns, VECTOR_BODY(&) { cpu::store<Dtype::f32>(cpu::load<V, D>(x, c, n), v, c, n); });
  }
  V squares{};  // of the centred values: E[x^2] - E[x]^2 cancels
  cpu::for_each_vector<V>(
      0, columns, VECTOR_BODY(&) {
        const V d = cpu::first_lanes(cpu::load<V, Dtype::f32>(v, c, n) - mean, n);
        squares = cpu::fma(d, d, squares);
      });
  const int64_t sample = row / p.rows_per_sample;
  const Affine ada_scale = p.ada_scale.of(sample), ada_shift = p.ada_shift.of(sample);
  const float total = cpu::sum(squares);
  // total * 0: squares that overflow show as NaN, not as values of 0
  const float inverse = 1.0f / std::sqrt(total / columns + p.eps) + total * 0.0f;
  cpu::for_each_vector<V>(
      0, columns, VECTOR_BODY(&) {
        V y = (cpu::load<V, Dtype::f32>(v, c, n) - mean) * inverse;
        if (p.weight.data) y *= load_affine<V, A>(p.weight, c, n);
        if (p.bias.data) y += load_affine<V, A>(p.bias, c, n);
        if (ada_scale.data) y *= 1.0f + load_affine<V, A>(ada_scale, c, n);
        if (ada_shift.data) y += load_affine<V, A>(ada_shift, c, n);
        cpu::store<Dtype::f32>(y, v, c, n);
      });
}

void norm_quantize_rows(const NormQuantizeParams& p, int64_t first, int64_t last) {
  std::vector<float> buffer(p.x.columns);
  float* v = buffer.data();
  cpu::with_vectors(VECTOR_CODE {
    for (int64_t row = first; row < last; ++row) {
      cpu::with_float_dtype(p.x.dtype, [&](auto D) __attribute__((always_inline)) { norm_row<V, D()>(p, v, row); });
      quantize_to_row(v, Dtype::f32, p.out, row);
    }
  });
}

}  // namespace

void norm_quantize_cpu(const NormQuantizeParams& p) {
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(p.x.columns),
                              [&](int64_t first, int64_t last) { norm_quantize_rows(p, first, last); });
}

void norm_rows(const NormQuantizeParams& p, Dtype affine_dtype, void* out, Dtype out_dtype) {
  const int64_t columns = p.x.columns;
  torch::stable::parallel_for(0, p.x.rows, cpu::grain(columns), [&](int64_t first, int64_t last) {
    std::vector<float> buffer(columns);
    float* v = buffer.data();
    cpu::with_vectors(VECTOR_CODE {
      for (int64_t row = first; row < last; ++row) {
        cpu::with_float_dtype(affine_dtype,
                              [&](auto A) __attribute__((always_inline)) { norm_row<V, Dtype::f32, A()>(p, v, row); });
        char* to = static_cast<char*>(out) + row * columns * size_of(out_dtype);
        cpu::with_float_dtype(out_dtype, [&](auto D) __attribute__((always_inline)) {
          cpu::for_each_vector<V>(
              0, columns, VECTOR_BODY(&) { cpu::store<D()>(cpu::load<V, Dtype::f32>(v, c, n), to, c, n); });
        });
      }
    });
  });
}

}  // namespace forwardpass
