// unpermute: reads every row that is chosen once, writes every token once; two operations for each element that is
// read, so that bytes bind. A thread has eight columns of a token. Dtypes are uniform branches, not kernels of their
// own.
#include "device/dependent_launch.cuh"
#include "device/vec.cuh"
#include "params/unpermute.h"

namespace forwardpass {

struct UnpermuteConfig {
  static constexpr int kThreads = 128;
  static constexpr int kLoads = 4;  // rows whose loads are in flight together: of few tokens latency binds
};

template <Dtype D>
__device__ void unpermute_columns(const UnpermuteParams& p, int64_t token, int64_t column, bool aligned) {
  constexpr int kLoads = UnpermuteConfig::kLoads;
  const int n = static_cast<int>(min(int64_t{kVec}, p.y.columns - column));
  const int64_t first = token * p.choices;
  auto y = static_cast<const cuda_t<D>*>(p.y.data) + column;
  float sum[kVec] = {};
  for (int begin = 0; begin < p.choices; begin += kLoads) {
    int64_t rows[kLoads];  // -1: none
    Vec<cuda_t<D>> values[kLoads];
    float weights[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      rows[i] = begin + i < p.choices ? p.position[first + begin + i] : -1;
      if (rows[i] >= p.y.rows) rows[i] = -1;
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (rows[i] < 0) continue;
      values[i] = load_vec(y + rows[i] * p.y.stride, n, aligned);
      weights[i] = load_float(p.weights, p.weights_dtype, first + begin + i);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      if (rows[i] < 0) continue;
#pragma unroll
      for (int j = 0; j < kVec; ++j) sum[j] = __fadd_rn(sum[j], __fmul_rn(weights[i], to_float(values[i].e[j])));
    }
  }
  Vec<cuda_t<D>> out;
#pragma unroll
  for (int j = 0; j < kVec; ++j) from_float(sum[j], out.e[j]);
  store_vec(out, static_cast<cuda_t<D>*>(p.out) + token * p.y.columns + column, n, p.y.columns % kVec == 0);
}

__global__ void __launch_bounds__(UnpermuteConfig::kThreads)
    unpermute_kernel(const __grid_constant__ UnpermuteParams p, bool aligned) {
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  const auto tokens = static_cast<unsigned>(p.tokens), token = blockIdx.x % tokens;
  const int64_t column = (int64_t{blockIdx.x / tokens} * UnpermuteConfig::kThreads + threadIdx.x) * kVec;
  if (column >= p.y.columns) return;
  if (p.y.dtype == Dtype::f32)
    unpermute_columns<Dtype::f32>(p, token, column, aligned);
  else if (p.y.dtype == Dtype::f16)
    unpermute_columns<Dtype::f16>(p, token, column, aligned);
  else
    unpermute_columns<Dtype::bf16>(p, token, column, aligned);
}

}  // namespace forwardpass

int forwardpass_unpermute(const forwardpass::UnpermuteParams* p, void* stream) {
  using namespace forwardpass;
  constexpr int kColumns = UnpermuteConfig::kThreads * kVec;  // of a block
  const int64_t grid = p->tokens * ((p->y.columns + kColumns - 1) / kColumns);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  const bool aligned = is_aligned(p->y.data) && p->y.stride * size_of(p->y.dtype) % 16 == 0;
  const Launch launch{
      .grid = grid, .block = UnpermuteConfig::kThreads, .dependent = waits_for_earlier_kernels(p->device.arch)};
  return launch_kernel(unpermute_kernel, launch, static_cast<cudaStream_t>(stream), *p, aligned);
}
