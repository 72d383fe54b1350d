// New tokens into a cache: every row of k, rotated, and of v goes through a buffer of floats.
#include <torch/csrc/stable/ops.h>

#include "cpu/memory.h"
#include "cpu/quantize_rows.h"
#include "params/append_kv.h"

namespace forwardpass {
namespace cpu {
namespace {

const char* element(const AttentionTensor& t, int64_t batch, int64_t row, int64_t head, Dtype dtype) {
  return static_cast<const char*>(t.data) + (batch * t.batch + row * t.row + head * t.head) * size_of(dtype);
}

template <class V>
INLINE void to_floats(const char* from, Dtype dtype, int64_t columns, float* to) {
  with_float_dtype(dtype, [&](auto d) __attribute__((always_inline)) {
    for_each_vector<V>(
        0, columns, VECTOR_BODY(&) { store<Dtype::f32>(load<V, decltype(d)::value>(from, c, n), to, c, n); });
  });
}

// buffer: the row and, from `columns` on, its cosines and sines.
template <class V>
INLINE void rotate(const AppendKvParams& p, int64_t batch, int64_t token, float* buffer) {
  const int64_t half = p.rotated / 2;
  float *cos = buffer + p.cache.head_dim, *sin = cos + p.rotated;
  to_floats<V>(element(p.cos, batch, token, 0, p.rotary_dtype), p.rotary_dtype, p.rotated, cos);
  to_floats<V>(element(p.sin, batch, token, 0, p.rotary_dtype), p.rotary_dtype, p.rotated, sin);
  for_each_vector<V>(
      0, half, VECTOR_BODY(=) {
        const auto part = [&](const float* x, int64_t first)
                              __attribute__((always_inline)) { return load<V, Dtype::f32>(x, first + c, n); };
        const V low = part(buffer, 0), high = part(buffer, half);
        store<Dtype::f32>(low * part(cos, 0) - high * part(sin, 0), buffer, c, n);
        store<Dtype::f32>(high * part(cos, half) + low * part(sin, half), buffer, half + c, n);
      });
}

template <class V>
INLINE void write(const AppendKvParams& p, const float* row, const CacheTensor& to, const CacheScale& scale,
                  int64_t first, int64_t position, int64_t head) {
  const KvCache& c = p.cache;
  char* data = static_cast<char*>(to.data) + (first * to.first + position * to.row + head * to.head) * size_of(c.dtype);
  if (scale.data) {
    float* s = scale.data + first * scale.first + position * scale.row + head * scale.head;
    QuantizedRows out{};
    out.q = data, out.dtype = c.dtype, out.columns = out.group = c.head_dim, out.symmetric = true;
    if (scale.per_token) {
      out.scale = s;
    } else {
      out.static_scale = s;
    }
    quantize_row<V>(out, 0, [=](int64_t column, int n) __attribute__((always_inline)) {
      return load<V, Dtype::f32>(row, column, n);
    });
  } else {
    with_float_dtype(c.dtype, [&](auto d) __attribute__((always_inline)) {
      for_each_vector<V>(0, c.head_dim, [&](int64_t column, int n) __attribute__((always_inline)) {
        store<decltype(d)::value>(load<V, Dtype::f32>(row, column, n), data, column, n);
      });
    });
  }
}

// Of each token of all sequences, one after the other, from the first to the last.
void append(const AppendKvParams& p, int64_t begin, int64_t end) {
  const KvCache& c = p.cache;
  const CacheLines memory = allocate(4 * (c.head_dim + 2 * p.rotated));
  auto row = reinterpret_cast<float*>(memory.get());
  with_vectors(VECTOR_CODE {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t batch = i / p.tokens, token = i % p.tokens;
      int64_t position = c.seq_lens[batch] - p.tokens + token, first = batch;
      if (position < 0) continue;
      if (c.block_table) {
        first = c.block_table[batch * c.table_stride + position / c.page];
        position %= c.page;
      }
      for (int64_t head = 0; head < c.heads; ++head) {
        to_floats<V>(element(p.k, batch, token, head, p.dtype), p.dtype, c.head_dim, row);
        if (p.rotated) rotate<V>(p, batch, token, row);
        write<V>(p, row, c.k, c.k_scale, first, position, head);
        to_floats<V>(element(p.v, batch, token, head, p.dtype), p.dtype, c.head_dim, row);
        write<V>(p, row, c.v, c.v_scale, first, position, head);
      }
    }
  });
}

}  // namespace
}  // namespace cpu

void append_kv_cpu(const AppendKvParams& p) {
  torch::stable::parallel_for(0, int64_t{p.cache.batch} * p.tokens, cpu::grain(p.cache.heads * p.cache.head_dim),
                              [&](int64_t begin, int64_t end) { cpu::append(p, begin, end); });
}

}  // namespace forwardpass
