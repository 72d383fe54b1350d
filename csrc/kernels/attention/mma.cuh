#pragma once
// attention on mma.sync m16n8k16. A block computes M rows of one head, key block after key block. K and V have one
// buffer each, filled by cp.async: V's during q k^T, the next K's during p v.
//
// Tensor cores bind, if they are kept busy. A score at head dim 128, 256 multiply-adds, takes them one clock on a
// subpartition of an A100 and four on one of a 4090; the other instructions, about 14 per score of 32 lanes, issue in
// 0.5 clocks.
#include <algorithm>

#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "kernels/attention/combine_prefill.cuh"
#include "kernels/attention/kernel.h"
#include "kernels/attention/scores.cuh"
#include "kernels/attention/source_paged.cuh"

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
template <class Config>
struct MmaAttentionMainloop;
template <class Config>
struct MmaAttentionEpilogue;

template <AttentionInstance kInstance, MmaAttentionTile kTile>
struct MmaAttentionConfig {
  static constexpr Dtype kDtype = kInstance.dtype;
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified, kPaged = kInstance.paged;
  static constexpr int kM = kTile.m, kN = kTile.n, kWarps = kTile.warps, kThreads = 32 * kWarps,
                       kBlocksPerSm = kTile.blocks_per_sm;
  static constexpr int kWarpM = kM / kWarps, kTilesM = kWarpM / 16;

  using Schedule = MmaAttentionSchedule<MmaAttentionConfig>;
  using Source = std::conditional_t<kPaged, PagedSource<MmaAttentionConfig>, DenseSource<MmaAttentionConfig>>;
  using Scores = Fragments<float, kTilesM, kN / 8>;
  using Output = Fragments<float, kTilesM, kValueDim / 8>;
  using Mainloop = MmaAttentionMainloop<MmaAttentionConfig>;
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

template <class Config>
using CopyQ = RowCopy<Config::kM, Config::kHeadDim, Config::kThreads>;

struct MmaAttentionArguments {
  AttentionParams p;
  unsigned tiles;  // of a head
  int splits;      // blocks that share a tile's keys; of several a second kernel combines the results
  int64_t q_step;  // RowCopy's
  DenseSteps source;
  float scale;  // of the softmax
};

// A block computes one tile, or of one a part of the keys: f().
template <class Config>
struct MmaAttentionSchedule {
  const MmaAttentionArguments& a;
  typename Config::SharedStorage& s;

  template <class F>
  __device__ void for_each(F f) const {
    AttentionTile tile;
    if (!tile.find(a.p, Config::kM, a.tiles, blockIdx.x / a.splits, known_sequences(a.p))) return;
    if (threadIdx.x == 0) {
      s.tile = tile;
      s.blocks = KeyBlocks(a.p, tile, Config::kM, Config::kN).part(static_cast<int>(blockIdx.x) % a.splits, a.splits);
    }
    __syncthreads();
    f(s.tile, s.blocks);
  }
};

template <class Config>
struct MmaAttentionMainloop {
  static constexpr Dtype kDtype = Config::kDtype;
  using Scores = typename Config::Scores;
  using Output = typename Config::Output;
  using Modifiers = ScoreModifiers<Scores, !Config::kPaged>;
  const MmaAttentionArguments& a;
  typename Config::SharedStorage& s;
  const int warp_row;  // this warp's first row in the tile

  __device__ void operator()(const AttentionTile& tile, const KeyBlocks& blocks, Output& o,
                             OnlineSoftmax<Config::kTilesM>& softmax) const {
    const AttentionParams& p = a.p;
    const auto first_row = [&] { return tile.row + warp_row; };  // this warp's, in the sequence
    const int first_block = blocks.end - 1;                      // that comes first: the last one
    typename Config::Source source(a, s.source, tile, first_block);
    o.clear();
    if (blocks.end > blocks.begin) {
      CopyQ<Config> copy_q(p.q, tile.q(p) + tile.row * p.q.row);
      copy_q.template copy<false>(s.q, a.q_step, tile.rows - tile.row, p.head_dim);
      source.begin(first_block);
      source.template copy_k<false>(s.k, first_block, tile.keys - first_block * Config::kN, p.head_dim);
    }
    const bool vectors = Config::kModified && Modifiers::in_vectors(p, tile);
    // From the last block to the first, so that the one that may end beyond the keys comes first.
    const auto attend = [&](int block, auto may_be_masked, bool masked = true) {
      constexpr bool kMayBeMasked = decltype(may_be_masked)::value;
      Scores scores;
      ptx::cp_async_wait<0>();
      __syncthreads();  // k has arrived for all warps, and all have read v
      const int keys = tile.keys - block * Config::kN;
      if (kMayBeMasked && masked)
        source.template copy_v<false>(s.v, block, keys, p.value_dim);
      else
        source.template copy_v<true>(s.v, block, keys, p.value_dim);
      if (block > blocks.begin) source.look_up(block - 1);
      const int key = block * Config::kN + accumulator_column(0);
      typename Modifiers::MaskWords mask;
      if (Config::kModified) Modifiers(p, tile, first_row(), vectors).load(mask, key);
      mma_q_k(scores);
      if (block > blocks.begin) source.keep(block - 1);
      ptx::cp_async_wait<0>();
      __syncthreads();  // v has arrived, and all have read k
      source.step_back();
      if (block > blocks.begin) source.template copy_k<true>(s.k, block - 1, Config::kN, p.head_dim);
      if (Config::kModified) Modifiers(p, tile, first_row(), vectors)(scores, mask, key);
      if (kMayBeMasked && masked) RowBounds<Scores>(p, tile, first_row())(scores, key);
      RowValues<Config::kTilesM> factor;
      if (softmax.update(scores, a.scale, factor)) rescale(o, factor);
      mma_p_v(o, scores);
    };
    int block = blocks.end - 1;
    if constexpr (Config::kModified) {
      // A branch around RowBounds: a second copy of the modifiers takes as long to compile as all the rest.
      const int unmasked_begin = blocks.unmasked_begin, unmasked_end = blocks.unmasked_end;
#pragma unroll 1
      for (; block >= blocks.begin; --block)
        attend(block, std::true_type{}, block >= unmasked_end || block < unmasked_begin);
    } else {
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        const int stop = phase == 0 ? blocks.unmasked_end : blocks.begin;
#pragma unroll 1
        for (; block >= stop; --block) attend(block, std::true_type{});
        if (phase == 1) break;
#pragma unroll 1
        for (; block >= blocks.unmasked_begin; --block) attend(block, std::false_type{});
      }
    }
  }

 private:
  // scores = q k^T, of this warp's rows and a block of keys.
  __device__ void mma_q_k(Scores& scores) const {
    using P = Panels<Config::kHeadDim>;
    constexpr float kZeros[4] = {};
#pragma unroll
    for (int step = 0; step < Config::kHeadDim / 16; ++step) {
      uint32_t q[Config::kTilesM][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i)
        ptx::ldmatrix_x4(q[i], P::template matrices<Config::kM, true>(s.q, warp_row + i * 16, step * 16));
#pragma unroll
      for (int j = 0; j < Scores::kTilesN; j += 2) {
        uint32_t k[4];
        ptx::ldmatrix_x4(k, P::template matrices<Config::kN, false>(s.k, j * 8, step * 16));
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {k[next * 2], k[next * 2 + 1]};
#pragma unroll
          for (int i = 0; i < Config::kTilesM; ++i)
            if (step == 0)
              ptx::mma_m16n8k16<kDtype>(scores[i][j + next], q[i], pair, kZeros);
            else
              ptx::mma_m16n8k16<kDtype>(scores[i][j + next], q[i], pair, scores[i][j + next]);
        }
      }
    }
  }
  // o += p v. Two tiles of p, rounded to 16 bits, are the first operand of an mma as they are.
  __device__ void mma_p_v(Output& o, const Scores& p) const {
    using P = Panels<Config::kValueDim>;
#pragma unroll
    for (int step = 0; step < Config::kN / 16; ++step) {
      uint32_t weights[Config::kTilesM][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i) pack_operand<kDtype>(weights[i], p[i], step);
#pragma unroll
      for (int j = 0; j < Output::kTilesN; j += 2) {
        uint32_t v[4];
        ptx::ldmatrix_x4_trans(v, P::template matrices<Config::kN, true>(s.v, step * 16, j * 8));
#pragma unroll
        for (int next = 0; next < 2; ++next) {
          const uint32_t pair[2] = {v[next * 2], v[next * 2 + 1]};
#pragma unroll
          for (int i = 0; i < Config::kTilesM; ++i)
            ptx::mma_m16n8k16<kDtype>(o[i][j + next], weights[i], pair, o[i][j + next]);
        }
      }
    }
  }
};

template <class Config>
struct MmaAttentionEpilogue {
  using Output = typename Config::Output;
  const AttentionParams& p;
  typename Config::SharedStorage& s;
  const int warp_row;  // this warp's first row in the tile
  const int splits;

  __device__ void operator()(const AttentionTile& tile, Output& o, OnlineSoftmax<Config::kTilesM>& softmax) const {
    if (splits > 1) {
      const PartialResult to(p.workspace, blockIdx.x, Config::kM, p.value_dim);
      store_sums(to, warp_row, softmax);
      return store_values(to, warp_row, o, p.value_dim);
    }
    RowValues<Config::kTilesM> factor;
    softmax.finish(tile.known() ? sink_of(p, tile.head) : NAN, factor);
    rescale(o, factor);
    store_rows(o, tile);
    store_lse<Output>(softmax, p, tile, tile.row + warp_row);
  }

 private:
  // Stores this warp's rows in words of 16 bytes, through its own rows of q in shared memory: no other warp reads
  // those, and this one read them before a barrier.
  __device__ void store_rows(const Output& o, const AttentionTile& tile) const {
    using P = Panels<Config::kValueDim>;
    constexpr int kRows = Config::kWarpM;
    const int lane = threadIdx.x % 32;
    const auto rows = reinterpret_cast<char*>(s.q + warp_row * Config::kHeadDim);
#pragma unroll
    for (int i = 0; i < Output::kTilesM; ++i)
#pragma unroll
      for (int j = 0; j < Output::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; e += 2) {
          const int offset = P::template offset<kRows>(o.row(i, e), j * 8) + accumulator_column(e) * 2;
          *reinterpret_cast<uint32_t*>(rows + offset) = pack<Config::kDtype>(o[i][j][e], o[i][j][e + 1]);
        }
    __syncwarp();
    constexpr int kAcross = P::kChunks, kStep = 32 / kAcross;
#pragma unroll
    for (int r = 0; r < kRows; r += kStep) {
      const int in_warp = r + lane / kAcross, row = tile.row + warp_row + in_warp;
      if (row >= tile.rows) continue;
      const auto out = static_cast<uint16_t*>(p.out) + tile.out(p, row);
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel) {
        const int column = panel * P::kPanel + lane % kAcross * 8;
        if (column < p.value_dim)
          *reinterpret_cast<uint4*>(out + column) =
              *reinterpret_cast<const uint4*>(rows + P::template offset<kRows>(in_warp, column));
      }
    }
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
    attention_mma_kernel(const __grid_constant__ MmaAttentionArguments a) {
  if constexpr (Config::kLeastSharedKib > kSharedKib) return;  // never launched there: no code for it is in the library
  extern __shared__ __align__(128) uint8_t memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  const int warp_row = threadIdx.x / 32 * Config::kWarpM;
  const typename Config::Mainloop mainloop{a, s, warp_row};
  const typename Config::Epilogue epilogue{a.p, s, warp_row, a.splits};
  typename Config::Schedule{a, s}.for_each([&](const AttentionTile& tile, const KeyBlocks& blocks) {
    OnlineSoftmax<Config::kTilesM> softmax;
    typename Config::Output o;
    mainloop(tile, blocks, o, softmax);
    epilogue(tile, o, softmax);
  });
}

template <class Config>
cudaError_t launch_mma(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int splits = splits_of<Config>(p);
  const int64_t tiles = row_tiles(p, Config::kM), all_tiles = tiles * all_heads(p), grid = all_tiles * splits;
  if (grid > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = allow_shared<attention_mma_kernel<Config>>(kShared)) return e;
  const MmaAttentionArguments arguments{.p = p,
                                        .tiles = static_cast<unsigned>(tiles),
                                        .splits = splits,
                                        .q_step = CopyQ<Config>::step(p.q),
                                        .source = Config::Source::steps(p),
                                        .scale = Config::kModified ? 1 : p.scale * kLog2e};
  attention_mma_kernel<Config><<<static_cast<unsigned>(grid), Config::kThreads, kShared, stream>>>(arguments);
  if (auto e = cudaGetLastError(); e || splits == 1) return e;
  return launch_combine<Config, false>(p, splits, stream);
}

template <bool kPaged>
bool reads_keys(const AttentionParams& p) {
  return kPaged == (p.cache.seq_lens != nullptr);
}
template <AttentionInstance kInstance>
bool takes_large(const AttentionParams& p) {
  return p.device.arch < 89 &&
         p.device.shared_kib >= MmaAttentionConfig<kInstance, tile_of(kInstance, true)>::kLeastSharedKib;
}
template <AttentionInstance kInstance>
cudaError_t launch_instance(const AttentionParams& p, cudaStream_t stream) {
  using Large = MmaAttentionConfig<kInstance, tile_of(kInstance, true)>;
  using Small = MmaAttentionConfig<kInstance, tile_of(kInstance, false)>;
  static_assert(Small::kLeastSharedKib <= 100, "beyond 8.0 it has no code");
  return takes_large<kInstance>(p) ? launch_mma<Large>(p, stream) : launch_mma<Small>(p, stream);
}
template <AttentionInstance kInstance>
int64_t workspace_of_instance(const AttentionParams& p) {
  using Large = MmaAttentionConfig<kInstance, tile_of(kInstance, true)>;
  using Small = MmaAttentionConfig<kInstance, tile_of(kInstance, false)>;
  return takes_large<kInstance>(p) ? workspace_bytes<Large>(p) : workspace_bytes<Small>(p);
}
template <AttentionInstance kInstance>
constexpr AttentionKernel mma_attention{.arch = sm_80,
                                        .instance = kInstance,
                                        .reads = reads_keys<kInstance.paged>,
                                        .launch = launch_instance<kInstance>,
                                        .workspace = workspace_of_instance<kInstance>};

}  // namespace forwardpass
