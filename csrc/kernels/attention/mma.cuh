#pragma once
// attention on mma.sync m16n8k16. A block computes M rows of one head, key block after key block. K and V have one
// buffer each, filled by cp.async: V's during q k^T, the next K's during p v.
//
// Tensor cores bind, if they are kept busy. A score at head dim 128, 256 multiply-adds, takes them one clock on a
// subpartition of an A100 and four on one of a 4090; the other instructions, about 14 per score of 32 lanes, issue in
// 0.5 clocks.
#include <algorithm>

#include "device/shared_bytes.cuh"
#include "kernels/attention/kernel.h"
#include "kernels/attention/mma_consumer.cuh"

namespace forwardpass {

// What a block computes.
struct MmaAttentionTile {
  int m, n;           // rows, and keys of a block of keys
  int warps;          // that divide the rows
  int blocks_per_sm;  // that share a multiprocessor
};

// Two warps per scheduler, so that one's softmax overlaps the other's mma: two blocks of four warps with 32 rows each
// or, where those accumulators do not fit the registers, one of eight warps with 16 rows. Blocks of 64 keys, which take
// a fifth fewer instructions per score than those of 32, where the multiprocessor's shared memory holds them: in an
// A100's 164 KB always (`large`), in an L40S's 100 KB at some head dims.
constexpr MmaAttentionTile tile_of(AttentionInstance i, bool large) {
  if (i.head_dim >= 192) return {.m = 128, .n = i.head_dim == 256 && !large ? 32 : 64, .warps = 8, .blocks_per_sm = 1};
  if (i.modified) return {.m = 128, .n = 64, .warps = 8, .blocks_per_sm = 1};
  return {.m = 128, .n = i.head_dim == 128 && !large ? 32 : 64, .warps = 4, .blocks_per_sm = 2};
}

template <class Config>
struct MmaAttentionSchedule;

template <AttentionInstance kInstance, MmaAttentionTile kTile>
struct MmaAttentionConfig {
  static constexpr Dtype kDtype = kInstance.dtype;
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified, kPaged = kInstance.paged;
  static constexpr int kM = kTile.m, kN = kTile.n, kWarps = kTile.warps, kThreads = 32 * kWarps,
                       kBlocksPerSm = kTile.blocks_per_sm;
  static constexpr int kWarpM = kM / kWarps, kTilesM = kWarpM / 16;

  using Arguments = MmaAttentionArguments;
  using Schedule = MmaAttentionSchedule<MmaAttentionConfig>;
  using Source = std::conditional_t<kPaged, PagedSource<MmaAttentionConfig>, DenseSource<MmaAttentionConfig>>;
  using Scores = Fragments<float, kTilesM, kN / 8>;
  using Softmax = OnlineSoftmax<kTilesM>;
  using Output = Fragments<float, kTilesM, kValueDim / 8>;
  using Consumer = MmaAttentionConsumer<MmaAttentionConfig>;
  using Epilogue = MmaAttentionEpilogue<MmaAttentionConfig>;

  struct SharedStorage {
    alignas(128) uint16_t q[kM * kHeadDim];  // in the end the rows of out
    uint16_t k[kN * kHeadDim], v[kN * kValueDim];
    [[no_unique_address]] typename Source::Shared source;
    // In shared memory, as registers would spill.
    AttentionTile tile;
    KeyBlocks blocks;
  };
  static_assert(kValueDim <= kHeadDim);
  // Shared memory of a multiprocessor that holds the tile's blocks; the system has 1 KB of each.
  static constexpr int kLeastSharedKib = (kBlocksPerSm * (sizeof(SharedStorage) + 1024) + 1023) / 1024;
};

// A block computes one tile, or of one a part of the keys: f().
template <class Config>
struct MmaAttentionSchedule {
  const typename Config::Arguments& a;
  typename Config::SharedStorage& s;

  template <class F>
  __device__ void for_each(F f) const {
    const int splits = a.p.choice.splits;
    AttentionTile tile;
    if (!tile.find(a.p, Config::kM, a.tiles, blockIdx.x / splits, known_sequences(a.p))) return;
    if (threadIdx.x == 0) {
      s.tile = tile;
      s.blocks = KeyBlocks(a.p, tile, Config::kM, Config::kN).part(static_cast<int>(blockIdx.x) % splits, splits);
    }
    __syncthreads();
    f(s.tile, s.blocks);
  }
};

// Large tiles are compiled for 8.0 alone. What is compiled for 8.9 runs on every later architecture, where some have no
// more shared memory than an L40S, and ptxas spills 64 bytes for 10.0.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
constexpr int kSharedKib = 100;
#else
constexpr int kSharedKib = 164;
#endif

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    attention_mma_kernel(const __grid_constant__ typename Config::Arguments a) {
  if constexpr (Config::kLeastSharedKib > kSharedKib) return;  // never launched there: no code for it is in the library
  extern __shared__ __align__(128) uint8_t memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  typename Config::Schedule{a, s}.for_each([&](const AttentionTile& tile, const KeyBlocks& blocks) {
    typename Config::Softmax sums;
    typename Config::Output o;
    typename Config::Consumer(a, s, tile, blocks, sums, o)();
  });
}

template <class Config>
int launch_mma(const AttentionParams& p, void* cuda_stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  const int64_t tiles = row_tiles(p, Config::kM), grid = tiles * all_heads(p) * p.choice.splits;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = allow_shared<attention_mma_kernel<Config>>(kShared)) return e;
  const MmaAttentionArguments arguments{.p = p,
                                        .tiles = static_cast<unsigned>(tiles),
                                        .q_step = CopyQ<Config>::step(p.q),
                                        .source = Config::Source::steps(p),
                                        .scale = Config::kModified ? 1 : p.scale * kLog2e};
  attention_mma_kernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kShared, stream>>>(arguments);
  if (auto e = cudaGetLastError(); e || p.choice.splits == 1) return e;
  return launch_combine<Config, false>(p, stream);
}

template <bool kPaged>
bool reads_keys(const AttentionParams& p) {
  return kPaged == (p.cache.seq_lens != nullptr) && !p.packed;
}
template <AttentionInstance kInstance>
bool takes_large(const AttentionParams& p) {
  return p.device.arch < 89 &&
         p.device.shared_kib >= MmaAttentionConfig<kInstance, tile_of(kInstance, true)>::kLeastSharedKib;
}
template <AttentionInstance kInstance>
AttentionChoice choose_tile(const AttentionParams& p) {
  using Large = MmaAttentionConfig<kInstance, tile_of(kInstance, true)>;
  using Small = MmaAttentionConfig<kInstance, tile_of(kInstance, false)>;
  static_assert(Small::kLeastSharedKib <= 100, "beyond 8.0 it has no code");
  return takes_large<kInstance>(p) ? choose<Large>(p, launch_mma<Large>) : choose<Small>(p, launch_mma<Small>);
}
template <AttentionInstance kInstance>
constexpr AttentionKernel mma_attention{
    .arch = sm_80, .instance = kInstance, .reads = reads_keys<kInstance.paged>, .choose = choose_tile<kInstance>};

}  // namespace forwardpass
