// append_kv: a warp has one new row of k or of v. It is a few hundred bytes, and there are few of them: what the launch
// and one round of loads take binds, so that dtypes are uniform branches here, not kernels of their own.
#include "device/dependent_launch.cuh"
#include "device/vec.cuh"
#include "params/append_kv.h"

namespace forwardpass {

constexpr int kAppendWarps = 4;

// Where a token goes: false if it is before its sequence, or the cache has no such row.
struct CacheRow {
  int64_t first, row;
  __device__ bool find(const KvCache& c, int batch, int64_t position) {
    if (position < 0 || position >= c.capacity()) return false;
    first = batch, row = position;
    if (!c.block_table) return true;
    first = c.block_table[batch * c.table_stride + position / c.page], row = position % c.page;
    return first >= 0 && first < c.pages;
  }
};

__global__ void __launch_bounds__(kAppendWarps * 32) append_kv_kernel(const __grid_constant__ AppendKvParams p) {
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  const KvCache& c = p.cache;
  const int64_t index = int64_t{blockIdx.x} * kAppendWarps + threadIdx.x / 32;
  const bool is_v = index % 2;
  const int head = static_cast<int>(index / 2 % c.heads);
  const int64_t token = index / 2 / c.heads % p.tokens, batch = index / 2 / c.heads / p.tokens;
  if (batch >= c.batch) return;
  CacheRow to;
  if (!to.find(c, static_cast<int>(batch), int64_t{c.seq_lens[batch]} - p.tokens + token)) return;

  const AttentionTensor& from = is_v ? p.v : p.k;
  const int64_t begin = batch * from.batch + token * from.row + head * from.head;
  const int half = p.rotated / 2, lane = threadIdx.x % 32;
  const auto value = [&](int column) {
    const float x = load_float(from.data, p.dtype, begin + column);
    if (is_v || column >= p.rotated) return x;
    const bool low = column < half;
    const float other = load_float(from.data, p.dtype, begin + (low ? column + half : column - half));
    const float cos = load_float(p.cos.data, p.rotary_dtype, batch * p.cos.batch + token * p.cos.row + column),
                sin = load_float(p.sin.data, p.rotary_dtype, batch * p.sin.batch + token * p.sin.row + column);
    return __fadd_rn(__fmul_rn(x, cos), __fmul_rn(low ? -other : other, sin));
  };
  const auto each = [&](auto f) {
    for (int column = lane; column < c.head_dim; column += 32) f(column, value(column));
  };

  const CacheTensor& cache = is_v ? c.v : c.k;
  const CacheScale& scale = is_v ? c.v_scale : c.k_scale;
  const int64_t out = to.first * cache.first + to.row * cache.row + head * cache.head;
  const auto data = cache.data;
  if (!scale.data) {
    each([&](int column, float x) {
      if (c.dtype == Dtype::f32)
        static_cast<float*>(data)[out + column] = x;
      else if (c.dtype == Dtype::f16)
        from_float(x, static_cast<__half*>(data)[out + column]);
      else
        from_float(x, static_cast<__nv_bfloat16*>(data)[out + column]);
    });
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
  const int64_t rows = 2 * int64_t{p->cache.batch} * p->tokens * p->cache.heads,
                grid = (rows + kAppendWarps - 1) / kAppendWarps;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const Launch launch{.grid = grid, .block = kAppendWarps * 32, .dependent = waits_for_earlier_kernels(p->device.arch)};
  return launch_kernel(append_kv_kernel, launch, static_cast<cudaStream_t>(stream), *p);
}
