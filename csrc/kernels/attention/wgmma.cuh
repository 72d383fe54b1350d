#pragma once
// attention on wgmma, warp-specialised. Blocks are persistent: each computes tile after tile of 64 rows per consumer
// warpgroup. One producer warp finds the tiles and loads q, and block after block of keys and values, by TMA. A
// consumer's q k^T of the next block runs while it computes the softmax of this one, and so does p v, which takes p
// from registers. Two consumers take turns at issuing them (ping-pong).
#include "device/dependent_launch.cuh"
#include "device/pipeline.cuh"
#include "device/shared_bytes.cuh"
#include "device/wgmma.cuh"
#include "kernels/attention/kernel.h"
#include "kernels/attention/wgmma_consumer.cuh"
#include "schedule/persistent.cuh"

namespace forwardpass {

// What a block computes: 64 rows, those of a wgmma, per consumer warpgroup, by blocks of n keys.
struct WgmmaAttentionTile {
  int consumers;
  int n;
};

// Instructions per score in the main loop: 6.1 at 64 columns, 6.3 at 96, 6.5 at 128, 7.0 at 192, 8.4 at 256; 6.7 at
// 192 with 128 of v. Where a row's maximum grows, value_dim / n more, which rescale the output. Of the consumers'
// registers (240 with two warpgroups, 160 with three) a thread's accumulators take value_dim / 2, its scores n / 2 and
// p n / 4; tile, pipelines and softmax take about 40.
constexpr WgmmaAttentionTile tile_of(AttentionInstance i) {
  // Shared memory binds: q and two stages fill it. Score modifiers need registers.
  if (i.value_dim == 256) return {.consumers = 2, .n = i.modified ? 64 : 80};
  if (i.value_dim == 192) return {.consumers = 2, .n = 112};
  // At 64 columns there are enough registers for three consumer warpgroups, except with score modifiers; 160 keys would
  // spill 404 bytes.
  if (i.value_dim == 64 && !i.modified) return {.consumers = 3, .n = 128};
  // At 96 and 128 columns 176 keys would fit: with the rescaling, 6.7 instructions per score instead of 7.4. But blocks
  // of 128 end where the rows of a causal tile end; with 2048 keys, blocks of 176 compute 7 % more scores.
  return {.consumers = 2, .n = 128};
}

// What a block may have.
constexpr int kSharedBytes = 227 << 10;

template <class Config>
struct WgmmaAttentionSchedule;

template <AttentionInstance kInstance, WgmmaAttentionTile kTile>
struct WgmmaAttentionConfig {
  static constexpr Dtype kDtype = kInstance.dtype;
  static constexpr int kHeadDim = kInstance.head_dim, kValueDim = kInstance.value_dim;
  static constexpr bool kModified = kInstance.modified;
  static constexpr int kConsumers = kTile.consumers, kM = ptx::kWgmmaRows * kConsumers, kN = kTile.n,
                       kStages = kHeadDim == 64 ? 4 : 2;  // what shared memory holds
  static constexpr int kBlocksPerSm = 1, kThreads = ptx::kWarpgroup * (1 + kConsumers);
  static constexpr int kPanelsD = (kHeadDim + kPanel - 1) / kPanel, kPanelsV = (kValueDim + kPanel - 1) / kPanel;
  // Two stages of q, where shared memory holds them, so that the next tile's is there when this one ends.
  static constexpr int kRowBytes = kPanel * sizeof(uint16_t), kBlockBytes = kN * (kPanelsD + kPanelsV) * kRowBytes,
                       kQBytes = kM * kPanelsD * kRowBytes,
                       kQStages = 2 * kQBytes + kStages * kBlockBytes <= kSharedBytes - 1024 ? 2 : 1;
  // Whether a tile's last p v runs beside the next one's first q k^T, as within a tile. Head dim 128, modelled: without
  // it 16 x 1024 rows take 3 % longer, causal 7 %. Three consumers' registers do not hold both tiles (44 bytes are
  // spilled), nor do those of two with score modifiers at 128 columns (8 bytes).
  static constexpr bool kAhead = kQStages == 2 && kConsumers == 2 && !kModified;
  // At launch each thread has 168 registers with 384 threads, 128 with 512; setmaxnreg moves them from the producer to
  // the consumers.
  static constexpr int kProducerRegisters = kConsumers == 2 ? 24 : 32, kConsumerRegisters = kConsumers == 2 ? 240 : 160;
  // Ping-pong: two warpgroups take turns at issuing wgmmas, so that one computes its softmax while the other's wgmmas
  // run. With more columns the wgmmas take so long that they overlap anyway. Three of 64 columns wait for the special
  // functions as much as for the tensor cores: in turns, all three wait for the one whose softmax the schedulers serve
  // last, and 16 x 1024 rows take 8 % longer (modelled; 4 % in turns from the youngest to the oldest).
  static constexpr PingPong kPingPong = kHeadDim <= 128 && kConsumers == 2 ? PingPong::products : PingPong::none;
  static constexpr bool kSplits = true;  // blocks may share a tile's keys

  using Arguments = AttentionArguments;
  using Schedule = WgmmaAttentionSchedule<WgmmaAttentionConfig>;
  using Pipeline = forwardpass::Pipeline<kStages>;
  using QPipeline = forwardpass::Pipeline<kQStages>;
  using Source = BoxSource<WgmmaAttentionConfig>;
  using Scores = Fragments<float, 1, kN / 8>;
  using Output = Fragments<float, 1, kValueDim / 8>;
  using Products = HalfProducts<WgmmaAttentionConfig>;
  using Consumer = WgmmaAttentionConsumer<WgmmaAttentionConfig>;
  using Epilogue = WgmmaAttentionEpilogue<WgmmaAttentionConfig>;

  using Rows = uint16_t[kPanel];
  struct Key {
    Rows panel[kPanelsD][kN];
  };
  struct Value {
    Rows panel[kPanelsV][kN];
  };
  struct Query {
    Rows panel[kPanelsD][kM];
  };
  static constexpr int kQueryBytes = sizeof(Query),
                       kKeyBytes = sizeof(Key);  // that arrive with q, and with a block's k
  struct SharedStorage {
    Query q[kQStages];
    Key k[kStages];
    Value v[kStages];
    WgmmaAttentionWork work[kQStages];  // whose q it is
    // Of the producer, not in the 24 registers that it has: known_sequences, and where keys are.
    int known;
    typename Source::Shared source;
    PipelineBarriers<kQStages> q_barriers;
    PipelineBarriers<kStages> k_barriers, v_barriers;
  };
};

// The persistent tile schedule: f(tile, its key blocks, slot) for each tile of this block, or part of a tile's keys.
template <class Config>
struct WgmmaAttentionSchedule {
  const typename Config::Arguments& a;
  const int& known;  // sequences

  template <class F>
  __device__ void for_each(F f) const {
    for_each_tile(a.blocks, blockIdx.x, gridDim.x, [&](int64_t slot) {
      AttentionTile tile;
      const unsigned index = static_cast<unsigned>(slot), splits = a.p.choice.splits;
      if (tile.find(a.p, Config::kM, a.tiles, index / splits, known))
        f(tile, KeyBlocks(a.p, tile, Config::kM, Config::kN).part(index % splits, splits), index);
    });
  }
};

// The producer, a warp. k of a block comes before v of the block before, as the consumers use them, be that the last
// one of the tile before.
template <class Config>
struct WgmmaAttentionProducer {
  using Source = typename Config::Source;
  const typename Config::Arguments& a;
  typename Config::SharedStorage& s;
  typename Config::QPipeline q;
  typename Config::Pipeline k, v;
  bool has_v = false;  // there is a block whose k has been loaded, and not its v

  __device__ WgmmaAttentionProducer(const typename Config::Arguments& a, typename Config::SharedStorage& s)
      : a(a), s(s), q(s.q_barriers), k(s.k_barriers), v(s.v_barriers) {}

  // All tiles of this block.
  __device__ void operator()() {
    typename Config::Schedule{a, s.known}.for_each([&](const AttentionTile& t, const KeyBlocks& blocks, int slot) {
      const bool any = blocks.end > blocks.begin;
      if (any) Source::look_up(a, s, t, blocks.end - 1);
      load_q({t, blocks, slot}, any);
#pragma unroll 1
      for (int block = blocks.end - 1; block >= blocks.begin; --block) load_keys(t, block, block > blocks.begin);
      if (!Config::kAhead || !any) load_v();
    });
    load_v();
    announce({.slot = -1}, 0);
  }

 private:
  __device__ static int lane() { return static_cast<int>(threadIdx.x % 32); }
  __device__ void load_q(const WgmmaAttentionWork& work, bool any) {
    announce(work, any ? Config::kQueryBytes : 0);
    if (any && lane() == 0) Source::load_q(a, s.q[q.stage], work.tile, q.full(q.stage));
    q.advance();
  }
  // Tells the consumers of a tile, of whose q so many bytes follow.
  __device__ void announce(const WgmmaAttentionWork& work, int bytes) {
    q.wait_empty();
    if (lane() > 0) return;
    s.work[q.stage] = work;
    q.announce(bytes);
  }
  __device__ void load_keys(const AttentionTile& t, int block, bool has_next) {
    Source::find(a, s, t, block, has_next, k.stage);
    wait_empty(k, Config::kKeyBytes);
    Source::load_k(a, s, k.stage, k.full(k.stage));
    k.advance();
    load_v();
    has_v = true;
  }
  __device__ void load_v() {
    if (has_v) {
      wait_empty(v, sizeof(typename Config::Value));
      Source::load_v(a, s, v.stage, v.full(v.stage));
      v.advance();
    }
    has_v = false;
  }
  __device__ void wait_empty(const typename Config::Pipeline& pipeline, int bytes) {
    pipeline.wait_empty();
    if (lane() == 0) pipeline.announce(bytes);
    __syncwarp();
  }
};

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ typename Config::Arguments a) {
  extern __shared__ __align__(ptx::kSwizzleBytes) uint8_t memory[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(memory);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(a.q);
    ptx::prefetch_tensor_map(a.k);
    ptx::prefetch_tensor_map(a.v);
    constexpr int kConsumerWarps = 4 * Config::kConsumers;
    s.q_barriers.init(kConsumerWarps);
    s.k_barriers.init(kConsumerWarps);
    s.v_barriers.init(kConsumerWarps);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  const int known = known_sequences(a.p);
  if (threadIdx.x == Config::kConsumers * ptx::kWarpgroup) s.known = known;
  __syncwarp();
  const int warpgroup = uniform(threadIdx.x / ptx::kWarpgroup);
  if (warpgroup == Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x < Config::kConsumers * ptx::kWarpgroup + 32) WgmmaAttentionProducer<Config>(a, s)();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    typename Config::Consumer(a, s, warpgroup)();
  }
}

// Fills in what all arguments have, and launches the kernel.
template <class Config>
int launch_tiles(typename Config::Arguments& a, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int64_t tiles = row_tiles(a.p, Config::kM);
  a.tiles = static_cast<unsigned>(tiles), a.blocks = tiles * all_heads(a.p) * a.p.choice.splits;
  if (a.blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
  if (auto e = a.encode(Config::kM, Config::kN)) return e;
  if (auto e = allow_shared<attention_wgmma_kernel<Config>>(kShared)) return e;
  const Launch launch{.grid = std::min<int64_t>(a.blocks, a.p.device.sms),
                      .block = Config::kThreads,
                      .shared = kShared,
                      .dependent = true};
  return launch_kernel(attention_wgmma_kernel<Config>, launch, stream, a);
}
template <class Config>
int launch_wgmma(const AttentionParams& p, void* cuda_stream) {
  const auto stream = static_cast<cudaStream_t>(cuda_stream);
  AttentionArguments a{.p = p};
  if (auto e = launch_tiles<Config>(a, stream); e || p.choice.splits == 1) return e;
  return launch_combine<Config, true>(p, stream);
}

template <AttentionInstance kInstance>
AttentionChoice choose_wgmma(const AttentionParams& p) {
  using Config = WgmmaAttentionConfig<kInstance, tile_of(kInstance)>;
  return choose<Config>(p, launch_wgmma<Config>);
}
template <AttentionInstance kInstance>
constexpr AttentionKernel wgmma_attention{
    .arch = sm_90a, .instance = kInstance, .reads = loads_by_boxes, .choose = choose_wgmma<kInstance>};

}  // namespace forwardpass
