// norm_quantize, add_norm_quantize: 2 or 4 bytes per element in (twice that with a residual, and as much out), 1 out; a
// row is a segment of device/quantize_rows.cuh.
#include "device/dispatch.h"
#include "device/quantize_rows.cuh"
#include "params/norm_quantize.h"

namespace forwardpass {

// f(value, weight or bias) for each value of a vector.
template <class T, class F>
__device__ inline void for_each_affine(float (&v)[kVec], const Affine& a, int column, int n, bool aligned, F f) {
  if (!a.data) return;
  float c[kVec];
  if (!std::is_same_v<T, float> && a.dtype == Dtype::f32) {
    load_floats(c, static_cast<const float*>(a.data) + column, n, aligned);
  } else {
    load_floats(c, static_cast<const T*>(a.data) + column, n, aligned);
  }
#pragma unroll
  for (int i = 0; i < kVec; ++i) v[i] = f(v[i], c[i]);
}

// A row that is normed: x or, with a residual, the sum of both.
template <class T>
struct NormRow {
  const NormQuantizeParams& p;
  const Segment& s;
  const bool aligned;
  const T *x, *residual;  // [columns]
  T* residual_out;        // [columns]
  bool add;               // the residual is yet to be added
  const bool adapts;      // adaLN, asked once a vector: two pointers took 4 % more instructions of every norm
  const int64_t sample;
  // A layer norm does not change when the whole row is shifted. Computed relative to the row's first value, a large
  // common offset costs no accuracy, and a constant row has variance 0 exactly.
  float pivot = 0, mean = 0, inverse = 1;
  bool normalized = false;  // what is loaded

  __device__ NormRow(const NormQuantizeParams& p, const Segment& s, bool aligned)
      : p(p),
        s(s),
        aligned(aligned),
        x(static_cast<const T*>(p.x.data) + s.row * p.x.stride),
        residual(static_cast<const T*>(p.residual.data) + s.row * p.residual.stride),
        residual_out(static_cast<T*>(p.residual_out) + s.row * p.x.columns),
        add(p.residual.data),
        adapts(p.ada_scale.data || p.ada_shift.data),
        sample(adapts ? s.row / p.rows_per_sample : 0) {
    if (p.kind == Norm::layer && s.active)
      pivot = add ? to_float(rounded_sum(to_float(*x), to_float(*residual))) : to_float(*x);
  }
  __device__ static T rounded_sum(float a, float b) {
    T sum;
    from_float(__fadd_rn(a, b), sum);
    return sum;
  }
  __device__ static float plus(float a, float b) { return __fadd_rn(a, b); }
  __device__ static float times(float a, float b) { return __fmul_rn(a, b); }
  __device__ static float times_one_more(float a, float b) { return __fmul_rn(a, __fadd_rn(1, b)); }

  // A row that does not fit the registers is loaded again in every pass; in the last one as normalised values.
  __device__ void load(int base, Chunk& v) const {
    load_chunk(v, x, s, base, aligned);
    if (add) add_residual(base, v);
    for_each_vector(s, base, [&](int i, int column, int n) {
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = __fsub_rn(v[i][j], pivot);
      trim(v[i], n);
      if (normalized) normalize(column, n, v[i]);
    });
  }
  __device__ void add_residual(int base, Chunk& v) const {
    Chunk r;
    load_chunk(r, residual, s, base, aligned);
    for_each_vector(s, base, [&](int i, int column, int n) {
      Vec<T> sum;
#pragma unroll
      for (int j = 0; j < kVec; ++j) v[i][j] = to_float(sum.e[j] = rounded_sum(v[i][j], r[i][j]));
      store_vec(sum, residual_out + column, n, aligned);
    });
  }
  __device__ void normalize(int column, int n, float (&v)[kVec]) const {
#pragma unroll
    for (int i = 0; i < kVec; ++i) v[i] = __fmul_rn(__fsub_rn(v[i], mean), inverse);
    for_each_affine<T>(v, p.weight, column, n, aligned, times);
    for_each_affine<T>(v, p.bias, column, n, aligned, plus);
    if (adapts) {
      for_each_affine<T>(v, p.ada_scale.of(sample), column, n, aligned, times_one_more);
      for_each_affine<T>(v, p.ada_shift.of(sample), column, n, aligned, plus);
    }
    trim(v, n);
  }
  // The mean, of a layer norm, and the inverse of the root of the mean square.
  template <class Values>
  __device__ void find_moments(Values& values, float (&slots)[2][32]) {
    if (p.kind == Norm::layer) {
      float sum = 0;
      values.for_each([&](int, int, float (&v)[kVec]) {
#pragma unroll
        for (int i = 0; i < kVec; ++i) sum = __fadd_rn(sum, v[i]);
      });
      mean = __fdiv_rn(reduce_segment(sum, s, slots[0], plus), p.x.columns);
    }
    float squares = 0;  // of the centred values: E[x^2] - E[x]^2 cancels
    values.for_each([&](int, int n, float (&v)[kVec]) {
      float d[kVec];
#pragma unroll
      for (int i = 0; i < kVec; ++i) d[i] = __fsub_rn(v[i], mean);
      trim(d, n);
#pragma unroll
      for (int i = 0; i < kVec; ++i) squares = __fmaf_rn(d[i], d[i], squares);
    });
    squares = reduce_segment(squares, s, slots[1], plus);
    inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(squares, p.x.columns), p.eps)));
    inverse = __fmaf_rn(squares, 0.0f, inverse);  // squares that overflow show as NaN, not as values of 0
  }
};

template <Dtype D, bool kRotates>
__global__ void __launch_bounds__(RowsConfig::kMaxWidth)
    norm_quantize_kernel(NormQuantizeParams p, RowsLaunch l, bool aligned) {
  __shared__ float slots[2][32];  // of the two reductions
  ptx::launch_dependents();
  const Segment s(l, p.out, kRotates);
  NormRow<cuda_t<D>> row(p, s, aligned);
  SegmentValues values(s, [&](int base, Chunk& v) { row.load(base, v); });
  row.find_moments(values, slots);
  if (row.add) row.x = row.residual_out, row.add = false;  // each thread reads again what it wrote itself
  row.normalized = true;
  if (values.resident()) values.for_each([&](int column, int n, float (&v)[kVec]) { row.normalize(column, n, v); });
  quantize_segment<kRotates>(values, s, p.out);
}

}  // namespace forwardpass

int forwardpass_norm_quantize(const forwardpass::NormQuantizeParams* p, void* stream) {
  using namespace forwardpass;
  const RowsLaunch l = rows_launch(p->x.rows, p->out);
  const int64_t size = size_of(p->x.dtype);
  const auto rows_aligned = [](const void* data, int64_t stride_bytes) { return aligned16(data, stride_bytes, 0, 1); };
  const bool aligned =
      rows_aligned(p->x.data, p->x.stride * size) && rows_aligned(p->residual.data, p->residual.stride * size) &&
      rows_aligned(p->residual_out, p->residual_out ? p->x.columns * size : 0) && rows_aligned(p->weight.data, 0) &&
      rows_aligned(p->bias.data, 0) && rows_aligned(p->ada_scale.data, p->ada_scale.stride_bytes) &&
      rows_aligned(p->ada_shift.data, p->ada_shift.stride_bytes);
  return dispatch<Dtype::f32, Dtype::f16, Dtype::bf16>(p->x.dtype, [&](auto D) {
    return dispatch<false, true>(p->out.rotation != 0, [&](auto rotates) {
      norm_quantize_kernel<D(), rotates()><<<l.grid(), l.block, 0, cudaStream_t(stream)>>>(*p, l, aligned);
      return cudaGetLastError();
    });
  });
}
