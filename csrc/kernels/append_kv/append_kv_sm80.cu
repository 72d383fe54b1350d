// append_kv: a warp has one new row of q, k or v. It is a few hundred bytes, and there are few of them: what the launch
// and one round of loads take binds, so that dtypes are uniform branches here, not kernels of their own.
#include "device/dependent_launch.cuh"
#include "device/vec.cuh"
#include "params/append_kv.h"

namespace forwardpass {

constexpr int kAppendWarps = 4;

__device__ void store_float(float x, void* to, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32)
    static_cast<float*>(to)[i] = x;
  else if (dtype == Dtype::f16)
    from_float(x, static_cast<__half*>(to)[i]);
  else
    from_float(x, static_cast<__nv_bfloat16*>(to)[i]);
}

// A warp's row.
struct NewRow {
  const AppendKvParams& p;
  int64_t token, batch, begin;  // begin: in q, k or v
  int head, columns;
  bool is_q, is_v;
  const void* data;  // of q, k or v
  Affine weight;     // of the norm
  float factor = 1;  // 1 / the root of the mean square

  // index: of each token the rows of k and of v, in turns, then those of q.
  __device__ NewRow(const AppendKvParams& p, int64_t index) : p(p) {
    const int kv_rows = 2 * p.cache.heads, rows = kv_rows + p.q_heads, of_token = static_cast<int>(index % rows);
    token = index / rows % p.tokens, batch = index / rows / p.tokens;
    is_q = of_token >= kv_rows, is_v = !is_q && of_token % 2;
    head = is_q ? of_token - kv_rows : of_token / 2;
    columns = is_v ? p.cache.value_dim : p.cache.head_dim;
    const AttentionTensor& from = is_q ? p.q : is_v ? p.v : p.k;
    data = from.data, begin = batch * from.batch + token * from.row + head * from.head;
    weight = is_q ? p.q_norm : is_v ? Affine{} : p.k_norm;
  }
  __device__ bool exists() const { return batch < p.cache.batch; }
  // kNormSums are the lanes'.
  __device__ void find_norm() {
    static_assert(kNormSums == 32);
    if (!weight.data) return;
    float sum = 0;
    for (int column = threadIdx.x % 32; column < p.cache.head_dim; column += 32) {
      const float x = load(column);
      sum = __fadd_rn(sum, __fmul_rn(x, x));
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, lanes));
    factor = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, p.cache.head_dim), p.eps)));
    factor = __fmaf_rn(sum, 0.0f, factor);
  }
  // f(column, its value, normed and rotated) for each of this lane's columns
  template <class F>
  __device__ void for_each(F f) const {
    for (int column = threadIdx.x % 32; column < columns; column += 32) f(column, value(column));
  }

 private:
  __device__ float load(int column) const { return load_float(data, p.dtype, begin + column); }
  __device__ float normed(int column) const {
    const float x = load(column);
    return weight.data ? __fmul_rn(__fmul_rn(x, factor), load_float(weight.data, weight.dtype, column)) : x;
  }
  __device__ float value(int column) const {
    const float x = normed(column);
    if (is_v || column >= p.rotated) return x;
    const int partner = p.partner(column);
    const float other = normed(partner);
    const float cos = load_float(p.cos.data, p.rotary_dtype, batch * p.cos.batch + token * p.cos.row + column),
                sin = load_float(p.sin.data, p.rotary_dtype, batch * p.sin.batch + token * p.sin.row + column);
    return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(partner > column ? -other : other, sin));
  }
};

// As quantize_segment, operation by operation: into 8 bits by the row's scale, which is written if it is per token.
__device__ void store_quantized(const NewRow& row, uint8_t* to, float* scale, bool per_token, bool e4m3) {
  float inverse;
  if (per_token) {
    float range = 0;  // a NaN stays
    row.for_each([&](int, float x) { range = ptx::max_nan(range, fabsf(x)); });
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) range = ptx::max_nan(range, __shfl_xor_sync(0xffffffff, range, lanes));
    range = range < kLeastRange ? kLeastRange : range;
    const float steps = e4m3 ? 448.0f : 127.0f;
    inverse = __fdiv_rn(steps, range);
    if (threadIdx.x % 32 == 0) *scale = __fdiv_rn(range, steps);
  } else {
    inverse = __fdiv_rn(1.0f, *scale);
  }
  row.for_each([&](int column, float x) {
    const float y = __fmul_rn(x, inverse);
    to[column] = e4m3 ? static_cast<uint8_t>(to_e4m3x2(0, y)) : static_cast<uint8_t>(to_int(y, -127, 127));
  });
}

__global__ void __launch_bounds__(kAppendWarps * 32) append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  NewRow row(p, int64_t{blockIdx.x} * kAppendWarps + threadIdx.x / 32);
  if (!row.exists()) return;
  row.find_norm();
  const KvCache& c = p.cache;
  const AppendKvParams::Place to = p.place(static_cast<int>(row.batch), static_cast<int>(row.token));
  if (row.is_q) {
    const int64_t out = ((row.batch * p.tokens + row.token) * p.q_heads + row.head) * c.head_dim;
    row.for_each([&](int column, float x) { store_float(to.is_lost ? NAN : x, p.q_out, p.dtype, out + column); });
    return;
  }
  if (to.first < 0) return;
  const CacheTensor& cache = row.is_v ? c.v : c.k;
  const CacheScale& scale = row.is_v ? c.v_scale : c.k_scale;
  const int64_t out = to.first * cache.first + to.row * cache.row + row.head * cache.head;
  if (scale.data)
    store_quantized(row, static_cast<uint8_t*>(cache.data) + out,
                    scale.data + to.first * scale.first + to.row * scale.row + row.head * scale.head, scale.per_token,
                    c.dtype == Dtype::e4m3);
  else
    row.for_each([&](int column, float x) { store_float(x, cache.data, c.dtype, out + column); });
}

}  // namespace forwardpass

int forwardpass_append_kv(const forwardpass::AppendKvParams* p, void* stream) {
  using namespace forwardpass;
  const int64_t rows = int64_t{p->cache.batch} * p->tokens * (2 * p->cache.heads + p->q_heads),
                grid = (rows + kAppendWarps - 1) / kAppendWarps;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const Launch launch{.grid = grid, .block = kAppendWarps * 32, .dependent = waits_for_earlier_kernels(p->device.arch)};
  return launch_kernel(append_kv_kernel, launch, static_cast<cudaStream_t>(stream), *p);
}
