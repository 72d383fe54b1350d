#pragma once
// Split-KV of prefill: several blocks share the keys of a tile of rows, so that few tiles of many keys take as long as
// many do, and a second kernel combines their results.
#include <algorithm>

#include "device/dependent_launch.cuh"
#include "kernels/attention/combine.cuh"
#include "kernels/attention/scores.cuh"

namespace forwardpass {

// Of a part: a warp's sums, and what its values are, rows from warp_row on in the tile.
template <int kTilesM>
__device__ inline void store_sums(const PartialResult& to, int warp_row, const OnlineSoftmax<kTilesM>& softmax) {
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = warp_row + Fragments<float, kTilesM, 1>::row(i, 2 * half);
      const float sum = sum_of_group(softmax.sum[i][half]);
      if (thread_in_group() == 0) to.max[row] = softmax.max[i][half], to.sum[row] = sum;
    }
}
template <int kTilesM, int kTilesN>
__device__ inline void store_values(const PartialResult& to, int warp_row, const Fragments<float, kTilesM, kTilesN>& o,
                                    int columns) {
#pragma unroll
  for (int i = 0; i < kTilesM; ++i)
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const auto pairs =
          reinterpret_cast<float2*>(to.o + (warp_row + o.row(i, 2 * half)) * columns + accumulator_column(0));
#pragma unroll
      for (int j = 0; j < kTilesN; ++j)
        if (j * 8 < columns) pairs[j * 4] = {o[i][j][half * 2], o[i][j][half * 2 + 1]};
    }
}

// The parts of each row of a tile. A block has kCombineWarps of them, or of their columns.
template <int kM, bool kDependent>
__global__ void __launch_bounds__(32 * kCombineWarps)
    combine_attention_kernel(const __grid_constant__ AttentionParams p, unsigned tiles) {
  if (kDependent) {
    ptx::wait_for_earlier_kernels();
    ptx::launch_dependents();
  }
  const int panels = (p.value_dim + kCombineColumns - 1) / kCombineColumns, of_tile = kM * panels / kCombineWarps;
  const unsigned block = blockIdx.x / of_tile;
  const int index = static_cast<int>(blockIdx.x) % of_tile * kCombineWarps + static_cast<int>(threadIdx.x) / 32;
  const int row = index / panels, column = index % panels * kCombineColumns + static_cast<int>(threadIdx.x) % 32 * 4;
  AttentionTile tile;
  if (!tile.find(p, kM, tiles, block, 0) || tile.row + row >= tile.rows) return;
  CombinedResult result;
  const int splits = p.choice.splits;
  add_parts(result, 0, splits, 1, row, column, p.value_dim,
            [&](int n) { return PartialResult(p.workspace, int64_t{block} * splits + n, kM, p.value_dim); });
  const Denominator d(result.max, result.sum, tile.known() ? sink_of(p, tile.query_head(p, tile.row + row)) : NAN);
  if (p.lse && column == 0) p.lse[tile.lse(p, tile.row + row)] = log_of_sum(d.base, d.sum);
  if (column >= p.value_dim) return;
  const float f = d.factor;
  const auto packed = [&](float low, float high) {
    return p.dtype == Dtype::f16 ? pack<Dtype::f16>(low * f, high * f) : pack<Dtype::bf16>(low * f, high * f);
  };
  const float4& o = result.o;
  *reinterpret_cast<uint2*>(static_cast<uint16_t*>(p.out) + tile.out(p, tile.row + row) + column) = {packed(o.x, o.y),
                                                                                                     packed(o.z, o.w)};
}

// As many blocks per tile as fill the multiprocessors once, with kLeastKeys each. Of packed sequences only the device
// knows the keys.
template <class Config>
int splits_of(const AttentionParams& p) {
  constexpr int64_t kLeastKeys = 256, kMost = 32;
  if (p.cu_seqlens_q || p.batch_invariant) return 1;
  const int64_t blocks = row_tiles(p, Config::kM) * all_heads(p), room = int64_t{p.device.sms} * Config::kBlocksPerSm;
  const int64_t all = p.cache.seq_lens ? p.cache.capacity() : p.keys;
  const int64_t reach = int64_t{p.left} + p.right + Config::kM;  // of a tile's rows
  const int64_t splits = std::min({room / blocks, std::min(all, reach) / kLeastKeys, kMost});
  return static_cast<int>(std::max<int64_t>(splits, 1));
}
template <class Config>
AttentionChoice choose(const AttentionParams& p, int (*launch)(const AttentionParams& p, void* stream)) {
  AttentionChoice choice{.launch = launch, .splits = splits_of<Config>(p)};
  const int64_t tiles = row_tiles(p, Config::kM) * all_heads(p),
                floats = PartialResult::floats(Config::kM, p.value_dim);
  if (choice.splits > 1) choice.workspace_bytes = tiles * choice.splits * floats * int64_t{sizeof(float)};
  return choice;
}

// kDependent: it may begin before the parts' kernel has ended. Also tells apart the kernels of files that are compiled
// for different architectures.
template <class Config, bool kDependent>
cudaError_t launch_combine(const AttentionParams& p, cudaStream_t stream) {
  const int64_t tiles = row_tiles(p, Config::kM), panels = (p.value_dim + kCombineColumns - 1) / kCombineColumns;
  const Launch launch{.grid = tiles * all_heads(p) * Config::kM * panels / kCombineWarps,
                      .block = 32 * kCombineWarps,
                      .dependent = kDependent};
  return launch_kernel(combine_attention_kernel<Config::kM, kDependent>, launch, stream, p,
                       static_cast<unsigned>(tiles));
}

}  // namespace forwardpass
