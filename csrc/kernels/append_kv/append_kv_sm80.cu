// append_kv: a warp has one new row of q, k or v. It is a few hundred bytes, and there are few of them: what the launch
// and one round of loads take binds, so that dtypes are uniform branches here, not kernels of their own.
#include "device/dependent_launch.cuh"
#include "device/vec.cuh"
#include "params/append_kv.h"

namespace forwardpass {

constexpr int kAppendWarps = 4;

// 1 / the root of a row's mean square: kNormSums are the lanes'.
__device__ float inverse_root(const AppendKvParams& p, const AttentionTensor& from, int64_t begin) {
  static_assert(kNormSums == 32);
  float sum = 0;
  for (int column = threadIdx.x % 32; column < p.cache.head_dim; column += 32) {
    const float x = load_float(from.data, p.dtype, begin + column);
    sum = __fadd_rn(sum, __fmul_rn(x, x));
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum = __fadd_rn(sum, __shfl_xor_sync(0xffffffff, sum, lanes));
  const float inverse = __frcp_rn(__fsqrt_rn(__fadd_rn(__fdiv_rn(sum, p.cache.head_dim), p.eps)));
  return __fmaf_rn(sum, 0.0f, inverse);
}

__device__ void store_float(float x, void* to, Dtype dtype, int64_t i) {
  if (dtype == Dtype::f32)
    static_cast<float*>(to)[i] = x;
  else if (dtype == Dtype::f16)
    from_float(x, static_cast<__half*>(to)[i]);
  else
    from_float(x, static_cast<__nv_bfloat16*>(to)[i]);
}

__global__ void __launch_bounds__(kAppendWarps * 32) append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  const KvCache& c = p.cache;
  const int64_t index = int64_t{blockIdx.x} * kAppendWarps + threadIdx.x / 32;
  // Of each token the rows of k and of v, in turns, then those of q.
  const int rows = 2 * c.heads + p.q_heads, of_token = static_cast<int>(index % rows);
  const int64_t token = index / rows % p.tokens, batch = index / rows / p.tokens;
  if (batch >= c.batch) return;
  const bool is_q = of_token >= 2 * c.heads, is_v = !is_q && of_token % 2;
  const int head = is_q ? of_token - 2 * c.heads : of_token / 2;

  const AttentionTensor& from = is_q ? p.q : is_v ? p.v : p.k;
  const Affine weight = is_q ? p.q_norm : is_v ? Affine{} : p.k_norm;
  const int64_t begin = batch * from.batch + token * from.row + head * from.head;
  const int half = p.rotated / 2, lane = threadIdx.x % 32;
  const float factor = weight.data ? inverse_root(p, from, begin) : 1;
  const auto normed = [&](int column) {
    const float x = load_float(from.data, p.dtype, begin + column);
    return weight.data ? __fmul_rn(__fmul_rn(x, factor), load_float(weight.data, weight.dtype, column)) : x;
  };
  const auto value = [&](int column) {
    const float x = normed(column);
    if (is_v || column >= p.rotated) return x;
    const bool low = column < half;
    const float other = normed(low ? column + half : column - half);
    const float cos = load_float(p.cos.data, p.rotary_dtype, batch * p.cos.batch + token * p.cos.row + column),
                sin = load_float(p.sin.data, p.rotary_dtype, batch * p.sin.batch + token * p.sin.row + column);
    return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(low ? -other : other, sin));
  };
  const int columns = is_v ? c.value_dim : c.head_dim;
  const auto each = [&](auto f) {
    for (int column = lane; column < columns; column += 32) f(column, value(column));
  };
  const AppendKvParams::Place to = p.place(static_cast<int>(batch), static_cast<int>(token));
  if (is_q) {
    const int64_t out = ((batch * p.tokens + token) * p.q_heads + head) * c.head_dim;
    each([&](int column, float x) { store_float(to.is_lost ? NAN : x, p.q_out, p.dtype, out + column); });
    return;
  }
  if (to.first < 0) return;

  const CacheTensor& cache = is_v ? c.v : c.k;
  const CacheScale& scale = is_v ? c.v_scale : c.k_scale;
  const int64_t out = to.first * cache.first + to.row * cache.row + head * cache.head;
  const auto data = cache.data;
  if (!scale.data) {
    each([&](int column, float x) { store_float(x, data, c.dtype, out + column); });
    return;
  }
  // As quantize_segment, operation by operation.
  float* const s = scale.data + to.first * scale.first + to.row * scale.row + head * scale.head;
  const bool e4m3 = c.dtype == Dtype::e4m3;
  float inverse;
  if (scale.per_token) {
    float range = 0;  // a NaN stays
    each([&](int, float x) { range = ptx::max_nan(range, fabsf(x)); });
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) range = ptx::max_nan(range, __shfl_xor_sync(0xffffffff, range, lanes));
    range = range < kLeastRange ? kLeastRange : range;
    const float steps = e4m3 ? 448.0f : 127.0f;
    inverse = __fdiv_rn(steps, range);
    if (lane == 0) *s = __fdiv_rn(range, steps);
  } else {
    inverse = __fdiv_rn(1.0f, *s);
  }
  each([&](int column, float x) {
    const float y = __fmul_rn(x, inverse);
    static_cast<uint8_t*>(data)[out + column] =
        e4m3 ? static_cast<uint8_t>(to_e4m3x2(0, y)) : static_cast<uint8_t>(to_int(y, -127, 127));
  });
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
