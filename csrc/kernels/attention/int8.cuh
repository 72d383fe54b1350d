#pragma once
// attention_8bit on mma.sync m16n8k32: attention's kernel of mma.cuh, of q and k in int8, and v in int8 or e4m3. A
// block computes M rows of one head.
//
// Tensor cores bind: a score at head dim 128, 256 multiply-adds, takes them half a clock on a subpartition of an A100,
// one on an L40S's, and one and a half on a 4090's if v is e4m3.
#include "kernels/attention/int8_consumer.cuh"
#include "kernels/attention/mma.cuh"

namespace forwardpass {

// As attention's tiles. 32 rows a warp where their accumulators fit the registers.
constexpr MmaAttentionTile int8_tile_of(AttentionInstance i) {
  if (i.modified || i.head_dim > 128) return {.m = 128, .n = kInt8Keys, .warps = 8, .blocks_per_sm = 1};
  return {.m = 128, .n = kInt8Keys, .warps = 4, .blocks_per_sm = 2};
}

template <AttentionInstance kInstance, MmaAttentionTile kTile>
struct Int8AttentionConfig {
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified;
  using Values = ValueArithmetic<kInstance.dtype>;
  static constexpr int kM = kTile.m, kN = kTile.n, kWarps = kTile.warps, kThreads = 32 * kWarps,
                       kBlocksPerSm = kTile.blocks_per_sm;
  static constexpr int kWarpM = kM / kWarps, kTilesM = kWarpM / 16;

  using Arguments = Int8AttentionArguments;
  using Schedule = MmaAttentionSchedule<Int8AttentionConfig>;
  using Source = Int8Source<Int8AttentionConfig>;
  using Scores = Fragments<float, kTilesM, kN / 8>;
  using Softmax = BlockSoftmax<kTilesM, Values, !kModified>;
  using Output = Fragments<float, kTilesM, kValueDim / 8>;
  using Consumer = Int8AttentionConsumer<Int8AttentionConfig>;

  // Keys are grouped unless modifiers need them in their order.
  static constexpr int kScales = kModified ? kInt8GroupScales : kInt8Scales;
  struct Stage {  // a block of keys; bytes in pairs
    alignas(128) uint16_t k[kN * kHeadDim / 2], v[kValueDim * kN / 2];
    float scales[kScales];
  };
  struct SharedStorage {
    union {
      struct {
        alignas(128) uint16_t q8[kM * kHeadDim / 2];
        Stage stages[2];
      };
      uint16_t q[kM * kHeadDim];  // in the end the rows of out
    };
    AttentionTile tile;
    KeyBlocks blocks;
    alignas(16) int32_t magic[4];
    int64_t first_block;
  };
  static_assert(kValueDim <= kHeadDim && kN == kInt8Keys);
  static constexpr int kLeastSharedKib = (kBlocksPerSm * (sizeof(SharedStorage) + 1024) + 1023) / 1024;
  static_assert(kLeastSharedKib <= 100, "beyond 8.0 it has no code");
};

template <class Config>
int launch_int8(const AttentionParams& base, void* cuda_stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const auto& p = static_cast<const Attention8bitParams&>(base);
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const int64_t tiles = row_tiles(p, Config::kM), grid = tiles * all_heads(p);
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = allow_shared<attention_mma_kernel<Config>>(kShared)) return e;
  const auto operands = int8_operands<Config>(p);
  if (auto e = quantize_attention(p, operands, stream)) return e;
  const Int8AttentionArguments arguments{
      .p = p, .tiles = static_cast<unsigned>(tiles), .x = operands, .scale = p.scale * kLog2e};
  attention_mma_kernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kShared, stream>>>(arguments);
  return cudaGetLastError();
}

// No split-KV: a row's bits depend on nothing but its sequence.
template <class Config>
AttentionChoice choose_int8(const AttentionParams& p) {
  return {.launch = launch_int8<Config>, .splits = 1, .workspace_bytes = int8_operands<Config>(p).bytes};
}
template <AttentionInstance kInstance>
constexpr AttentionKernel int8_attention{
    .arch = kInstance.dtype == Dtype::e4m3 ? sm_89 : sm_80,
    .instance = kInstance,
    .reads = reads_keys<false>,
    .choose = choose_int8<Int8AttentionConfig<kInstance, int8_tile_of(kInstance)>>};

}  // namespace forwardpass
