// New tokens into a cache: every row of q, k and v goes through a buffer of floats.
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cmath>

#include "cpu/append_kv.h"
#include "cpu/memory.h"
#include "cpu/quantize_rows.h"
#include "cpu/rotary.h"
#include "params/append_kv.h"

namespace forwardpass {
namespace cpu {
namespace {

const char* element(const AttentionTensor& t, int64_t batch, int64_t row, int64_t head, Dtype dtype) {
  return static_cast<const char*>(t.data) + (batch * t.batch + row * t.row + head * t.head) * size_of(dtype);
}

// A row that is worked on, the cosines and sines of its token, and the sums of a norm.
struct Buffers {
  float *row, *cos, *sin, *sums;
};

template <class V>
INLINE void norm(const Affine& weight, float eps, int64_t columns, const Buffers& b) {
  float *row = b.row, *sums = b.sums;
  std::fill_n(sums, kNormSums, 0.0f);
  for (int64_t first = 0; first < columns; first += kNormSums)
    for_each_vector<V>(
        0, std::min<int64_t>(kNormSums, columns - first), VECTOR_BODY(=) {
          const V x = load<V, Dtype::f32>(row, first + c, n);
          store<Dtype::f32>(load<V, Dtype::f32>(sums, c, n) + x * x, sums, c, n);
        });
  for (int left = kNormSums / 2; left > 0; left /= 2)
    for (int i = 0; i < left; ++i) sums[i] += sums[i + left];
  const float inverse = 1 / std::sqrt(sums[0] / static_cast<float>(columns) + eps) + sums[0] * 0;
  with_float_dtype(weight.dtype, [&](auto d) __attribute__((always_inline)) {
    for_each_vector<V>(
        0, columns, VECTOR_BODY(=) {
          const V x = load<V, Dtype::f32>(row, c, n) * inverse;
          store<Dtype::f32>(x * load<V, decltype(d)::value>(weight.data, c, n), row, c, n);
        });
  });
}

template <class V>
INLINE void write(const AppendKvParams& p, const float* row, int32_t columns, const CacheTensor& to,
                  const CacheScale& scale, int64_t first, int64_t position, int64_t head) {
  const KvCache& c = p.cache;
  char* data = static_cast<char*>(to.data) + (first * to.first + position * to.row + head * to.head) * size_of(c.dtype);
  if (scale.data) {
    float* s = scale.data + first * scale.first + position * scale.row + head * scale.head;
    QuantizedRows out{};
    out.q = data, out.dtype = c.dtype, out.columns = out.group = columns, out.symmetric = true;
    if (scale.per_token) {
      out.scale = s;
    } else {
      out.static_scale = s;
    }
    quantize_to_row(row, Dtype::f32, out, 0);
  } else {
    from_floats<V>(row, c.dtype, columns, data);
  }
}

}  // namespace

void append(const AppendKvParams& p, int64_t begin, int64_t end) {
  const KvCache& c = p.cache;
  const int64_t widest = std::max(c.head_dim, c.value_dim);
  const CacheLines memory = allocate(4 * (widest + 2 * p.rotated + kNormSums));
  Buffers b;
  b.row = reinterpret_cast<float*>(memory.get());
  b.cos = b.row + widest, b.sin = b.cos + p.rotated, b.sums = b.sin + p.rotated;
  with_vectors(VECTOR_CODE {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.tokens, token = i % p.tokens;
      if (p.rotated) {
        to_floats<V>(element(p.cos, batch, token, 0, p.rotary_dtype), p.rotary_dtype, p.rotated, b.cos);
        to_floats<V>(element(p.sin, batch, token, 0, p.rotary_dtype), p.rotary_dtype, p.rotated, b.sin);
      }
      const auto prepare = [&](const AttentionTensor& x, int64_t head, const Affine& weight)
                               __attribute__((always_inline)) {
                                 to_floats<V>(element(x, batch, token, head, p.dtype), p.dtype, c.head_dim, b.row);
                                 if (weight.data) norm<V>(weight, p.eps, c.head_dim, b);
                                 if (p.rotated) rotate<V>(b.row, b.cos, b.sin, p.rotated, p.interleaved);
                               };
      const AppendKvParams::Place to = p.place(static_cast<int32_t>(batch), static_cast<int32_t>(token));
      for (int64_t head = 0; head < p.q_heads; ++head) {
        prepare(p.q, head, p.q_norm);
        if (to.is_lost) std::fill_n(b.row, c.head_dim, NAN);
        char* out = static_cast<char*>(p.q_out) + (i * p.q_heads + head) * c.head_dim * size_of(p.dtype);
        from_floats<V>(b.row, p.dtype, c.head_dim, out);
      }
      if (to.first < 0) continue;
      for (int64_t head = 0; head < c.heads; ++head) {
        prepare(p.k, head, p.k_norm);
        write<V>(p, b.row, c.head_dim, c.k, c.k_scale, to.first, to.row, head);
        to_floats<V>(element(p.v, batch, token, head, p.dtype), p.dtype, c.value_dim, b.row);
        write<V>(p, b.row, c.value_dim, c.v, c.v_scale, to.first, to.row, head);
      }
    }
  });
}

}  // namespace cpu

void append_kv_cpu(const AppendKvParams& p) {
  torch::stable::parallel_for(0, int64_t{p.cache.batch} * p.tokens,
                              cpu::grain((p.cache.heads + p.q_heads) * p.cache.head_dim),
                              [&](int64_t begin, int64_t end) { cpu::append(p, begin, end); });
}

}  // namespace forwardpass
