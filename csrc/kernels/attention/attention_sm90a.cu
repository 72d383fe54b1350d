// attention on wgmma. Blocks are persistent: each computes tile after tile of 64 rows per consumer warpgroup. One
// producer thread loads q, and block after block of keys and values, by TMA. A consumer's q k^T of the next block runs
// while it computes the softmax of this one, and so does p v, which takes p from registers.
#include "device/pipeline.cuh"
#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "device/tma_map.h"
#include "device/wgmma.cuh"
#include "kernels/attention/attention_instance.cuh"
#include "kernels/attention/attention_kernel.h"
#include "kernels/attention/attention_scores.cuh"

namespace forwardpass {

// Columns of 16 bits in a 128-byte swizzle atom.
constexpr int kPanel = 64;

// D, V: columns of q and k, and of v. Modified: with score modifiers. Consumers: consumer warpgroups. N: keys of a
// block.
template <Dtype T_, int D, int V, bool Modified, int Consumers, int N>
struct WgmmaAttentionConfig {
  static constexpr Dtype T = T_;
  static constexpr int kD = D, kV = V, kM = 64 * Consumers, kN = N, kConsumers = Consumers, kStages = 2;
  static constexpr bool kModified = Modified;
  static constexpr int kThreads = 128 * (1 + Consumers);
  static constexpr int kTiles = N / 8, kOutTiles = V / 8;
  static constexpr int kPanelsD = (D + kPanel - 1) / kPanel, kPanelsV = (V + kPanel - 1) / kPanel;
  // At launch each thread has 168 registers with 384 threads, 128 with 512; setmaxnreg moves them from the producer to
  // the consumers.
  static constexpr int kProducerRegisters = Consumers == 2 ? 24 : 32, kConsumerRegisters = Consumers == 2 ? 240 : 160;
  // Ping-pong: the warpgroups take turns at issuing wgmmas, so that one computes its softmax while the other's wgmmas
  // run. With more columns the wgmmas take so long that they overlap anyway.
  static constexpr bool kPingPong = D <= 128;

  using Rows = uint16_t[kPanel];
  struct Key {
    Rows panel[kPanelsD][N];
  };
  struct Value {
    Rows panel[kPanelsV][N];
  };
  struct SharedStorage {
    Rows q[kPanelsD][kM];
    Key k[kStages];
    Value v[kStages];
    PipelineBarriers<1> q_barriers;
    PipelineBarriers<kStages> k_barriers, v_barriers;
  };
};

// q, k and v are tensors of five dimensions: dim, row, head, and two that select the sequence.
struct AttentionArguments {
  AttentionParams p;
  unsigned tiles;  // of a head
  int64_t blocks;  // of all heads
  CUtensorMap q, k, v;
};

// Varlen: TMA has to zero-fill behind the end of each sequence, as whatever follows it may be NaN, and 0 times NaN is
// NaN. But a tensor map has one end for all. So the map's rows end at kEnd, and a sequence of `rows` rows that begins
// at row `first` is addressed as rows kEnd - rows to kEnd, which is too far by kEnd - rows - first rows. Two more
// dimensions correct the address, with coordinates first + rows and kEnd:
//
//   address / row bytes = (kEnd - rows + r) + (first + rows) * 1 + kEnd * (kBack / row bytes - 1)
//                       = first + r + kEnd * kBack / row bytes
//   and kEnd * kBack = 2^30 * 2^34 bytes = 2^64 bytes, which is 0 as addresses are modulo 2^64.
//
// No NVIDIA document promises that wrap.
constexpr int kEnd = 1 << 30;
constexpr int64_t kBack = int64_t{1} << 34;

struct SequenceOrigin {
  int row, head, at[2];

  // rows: those of the sequence, from row `first` of the packed tensor on.
  __device__ SequenceOrigin(const AttentionTensor& t, bool varlen, int batch, int head, int64_t first, int rows)
      : row(varlen ? kEnd - rows : 0),
        head(t.head ? head : 0),
        at{varlen    ? static_cast<int>(first) + rows
           : t.batch ? batch
                     : 0,
           varlen ? kEnd : 0} {}
  // Issues the TMA loads of all panels of a block of rows.
  template <int kPanels, int kRows>
  __device__ void load(uint16_t (&to)[kPanels][kRows][kPanel], const CUtensorMap& map, int r, uint32_t barrier) const {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int from[5] = {i * kPanel, row + r, head, at[0], at[1]};
      ptx::tma_load(ptx::shared_address(to[i]), map, from, barrier);
    }
  }
};

// Persistent tile scheduler: f(tile, its key blocks) for each tile of this block, back and forth through the grid, so
// that each block gets long tiles and short ones.
template <class Config, class F>
__device__ inline void for_each_tile(const AttentionArguments& a, F f) {
  for (unsigned round = 0;; ++round) {
    const int64_t block = int64_t{round} * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (block >= a.blocks) return;
    AttentionTile tile;
    if (tile.find(a.p, Config::kM, a.tiles, static_cast<unsigned>(block)))
      f(tile, KeyBlocks(a.p, tile, Config::kM, Config::kN));
  }
}

template <class Config>
__device__ inline void producer(const AttentionArguments& a, typename Config::SharedStorage& s) {
  Pipeline<1> q(s.q_barriers);
  Pipeline<Config::kStages> k(s.k_barriers), v(s.v_barriers);
  for_each_tile<Config>(a, [&](const AttentionTile& t, const KeyBlocks& blocks) {
    if (blocks.end <= blocks.begin) return;
    const bool varlen = a.p.cu_seqlens_q;
    const SequenceOrigin rows(a.p.q, varlen, t.batch, t.head, t.first_row, t.rows),
        k_keys(a.p.k, varlen, t.batch, t.kv_head(a.p), t.first_key, t.keys),
        v_keys(a.p.v, varlen, t.batch, t.kv_head(a.p), t.first_key, t.keys);
    const auto load_k = [&](int block) {
      k_keys.load(s.k[k.stage].panel, a.k, block * Config::kN, k.acquire(sizeof(typename Config::Key)));
      k.advance();
    };
    const auto load_v = [&](int block) {
      v_keys.load(s.v[v.stage].panel, a.v, block * Config::kN, v.acquire(sizeof(typename Config::Value)));
      v.advance();
    };
    rows.load(s.q, a.q, t.row, q.acquire(sizeof s.q));
    q.advance();
    // in the order in which the consumers use them
    int block = blocks.end - 1;
    load_k(block);
    for (; block > blocks.begin; --block) {
      load_k(block - 1);
      load_v(block);
    }
    load_v(block);
  });
}

// A consumer warpgroup's side of the pipelines, and its wgmmas.
template <class Config>
struct AttentionConsumer {
  static constexpr int kFirstTurn = 1;  // named barriers, one for each warpgroup; 0 is __syncthreads
  using Scores = float[1][Config::kTiles][4];
  using Accumulators = float[1][Config::kOutTiles][4];
  using Weights = uint32_t[Config::kN / 16][4];
  Pipeline<1> q;
  Pipeline<Config::kStages> k, v;
  uint32_t q_rows, k_rows, v_rows;  // low halves of the wgmma descriptors: of this warpgroup's rows; in the first stage
  int warpgroup;

  static constexpr int kStep = 16 * sizeof(uint16_t) / ptx::kDescriptorUnit;  // 16 columns
  static constexpr int kRow = kPanel * sizeof(uint16_t) / ptx::kDescriptorUnit;

  __device__ AttentionConsumer(typename Config::SharedStorage& s, int warpgroup)
      : q(s.q_barriers), k(s.k_barriers), v(s.v_barriers), warpgroup(warpgroup) {
    q_rows = uniform(ptx::descriptor(ptx::shared_address(s.q[0][warpgroup * 64])));
    k_rows = uniform(ptx::descriptor(ptx::shared_address(s.k[0].panel)));
    v_rows = uniform(ptx::descriptor(ptx::shared_address(s.v[0].panel), Config::kN * kPanel * sizeof(uint16_t)));
  }
  __device__ void mma_q_k(Scores& scores) {
    k.wait_full();
    wait_turn();
    ptx::wgmma_fence();
    const uint32_t at = k_rows + k.stage * (sizeof(typename Config::Key) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kD / 16; ++i) {
      const int column = i % 4 * kStep, panel = i / 4 * kRow;
      ptx::wgmma_k16<Config::T>(scores[0], q_rows + panel * Config::kM + column, at + panel * Config::kN + column,
                                i > 0);
    }
    ptx::wgmma_commit();
  }
  __device__ void mma_p_v(Accumulators& sums, const Weights& p) {
    ptx::wgmma_keep(sums[0]);
    ptx::wgmma_fence();
    const uint32_t at = v_rows + v.stage * (sizeof(typename Config::Value) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) ptx::wgmma_k16<Config::T, 1>(sums[0], p[i], at + i * 16 * kRow, true);
    ptx::wgmma_commit();
  }
  // Ping-pong, by a named barrier per warpgroup: it waits for its turn, and passes the turn to the next one.
  __device__ void wait_turn() const {
    if (Config::kPingPong) ptx::barrier_sync(kFirstTurn + warpgroup, 256);
  }
  __device__ void pass_turn() const {
    if (Config::kPingPong) ptx::barrier_arrive(kFirstTurn + (warpgroup + 1) % Config::kConsumers, 256);
  }
};

// Stores a tile's rows. The four lanes that share a row exchange their columns so that each has eight neighbouring
// ones: 16 bytes.
template <class Config>
__device__ inline void store_rows(const typename AttentionConsumer<Config>::Accumulators& o, const AttentionParams& p,
                                  const AttentionTile& tile, int row) {
  const int lane = threadIdx.x % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int at = row + half * 8;
    const auto out = static_cast<uint16_t*>(p.out) + tile.out(p, min(at, tile.rows - 1));
#pragma unroll
    for (int t = 0; t < Config::kOutTiles; t += 4) {
      uint32_t x[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) x[i] = pack<Config::T>(o[0][t + i][half * 2], o[0][t + i][half * 2 + 1]);
#pragma unroll
      for (int bit = 1; bit < 4; bit *= 2)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          if (i & bit) continue;
          uint32_t &low = x[i], &high = x[i + bit];
          const uint32_t got = __shfl_xor_sync(0xffffffff, lane & bit ? low : high, bit);
          (lane & bit ? low : high) = got;
        }
      const int column = (t + lane) * 8;
      if (at < tile.rows && column < p.value_dim)
        *reinterpret_cast<uint4*>(out + column) = make_uint4(x[0], x[1], x[2], x[3]);
    }
  }
}

template <class Config>
__device__ inline void consumer(const AttentionArguments& a, typename Config::SharedStorage& shared, int warpgroup) {
  const AttentionParams& p = a.p;
  using Consumer = AttentionConsumer<Config>;
  Consumer m(shared, warpgroup);
  const int lane = threadIdx.x % 32;
  if (warpgroup == Config::kConsumers - 1) m.pass_turn();
  for_each_tile<Config>(a, [&](const AttentionTile& tile, const KeyBlocks& blocks) {
    const int own = tile.row + warpgroup * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // this thread's first row
    const RowBounds<1> bounds(p, tile, own);
    const ScoreModifiers<1, Config::kTiles> modify(p, tile, own);
    const float scale = Config::kModified ? 1 : p.scale * kLog2e;

    OnlineSoftmax<1> softmax;
    typename Consumer::Accumulators o = {};
    typename Consumer::Weights weights;
    RowValues<1> factor;
    const auto attend = [&](int block, auto first, auto masked) {
      constexpr bool kFirst = decltype(first)::value;
      typename Consumer::Scores s;
      m.mma_q_k(s);
      const int v_stage = m.v.stage;
      if (!kFirst) {
        rescale(o, factor);
        m.mma_p_v(o, weights);
        m.v.advance();
      }
      m.pass_turn();
      const auto end_p_v = [&] {
        if (kFirst) return;
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(o[0]);
        m.v.release(v_stage);
      };
      ptx::wgmma_wait<kFirst ? 0 : 1>();
      ptx::wgmma_keep(s[0]);
      m.k.release(m.k.stage);
      m.k.advance();
      const int key = block * Config::kN + lane % 4 * 2;
      if (Config::kModified) {
        end_p_v();  // the registers of `weights` are needed
        modify(s, key);
      }
      if (decltype(masked)::value) bounds(s, key);
      softmax.update(s, scale, factor);
      ptx::wgmma_keep(s[0]);
      // This wait is here, not where v is needed: ptxas moves the wgmma wait below it upwards across anything but a
      // branch, and the softmax would then begin after p v has completed.
      m.v.wait_full();
      if (!Config::kModified) end_p_v();
#pragma unroll
      for (int i = 0; i < Config::kN / 16; ++i) pack_operand<Config::T>(weights[i], s[0], i);
    };
    const int begin = uniform(blocks.begin), unmasked_begin = uniform(blocks.unmasked_begin),
              unmasked_end = uniform(blocks.unmasked_end);
    int block = uniform(blocks.end) - 1;
    if (block >= begin) {
      m.q.wait_full();
      attend(block--, std::true_type{}, std::true_type{});
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        const int stop = phase == 0 ? unmasked_end : begin;
#pragma unroll 1
        for (; block >= stop; --block) attend(block, std::false_type{}, std::true_type{});
        if (phase == 1) break;
#pragma unroll 1
        for (; block >= unmasked_begin; --block) attend(block, std::false_type{}, std::false_type{});
      }
      m.q.release(m.q.stage);
      m.q.advance();
      rescale(o, factor);
      m.mma_p_v(o, weights);
      ptx::wgmma_wait<0>();
      ptx::wgmma_keep(o[0]);
      m.v.release(m.v.stage);
      m.v.advance();
    }
    RowValues<1> lse;
    softmax.finish(sink_of(p, tile.head), factor, lse);
    rescale(o, factor);
    store_rows<Config>(o, p, tile, own);
    store_lse<1>(lse, p, tile, own);
    __syncwarp();  // lanes diverged at their rows' ends; what follows is warp-synchronous
  });
  if (warpgroup == 0) m.wait_turn();  // takes the last pass, so that the barrier is left empty
}

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, 1)
    attention_wgmma_kernel(const __grid_constant__ AttentionArguments a) {
  extern __shared__ __align__(1024) uint8_t memory[];
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
  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == Config::kConsumers * 128) producer<Config>(a, s);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    consumer<Config>(a, s, warpgroup);
  }
}

template <class Config>
cudaError_t launch_wgmma(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int64_t tiles = row_tiles(p, Config::kM);
  AttentionArguments a{p, static_cast<unsigned>(tiles), tiles * all_heads(p), {}, {}, {}};
  if (a.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  // A dimension over which an operand is broadcast is left out: no document promises that a tensor map may have a
  // stride of 0.
  const auto operand = [&](CUtensorMap& to, const AttentionTensor& t, int dim, int rows, int heads, int box_rows) {
    constexpr int64_t kSize = sizeof(uint16_t), kAny = 0x7fffffff;
    const auto type = p.dtype == Dtype::f16 ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
    const auto bytes = [&](int64_t stride) { return stride ? stride * kSize : 16; };
    const int64_t row = rows == 1 ? 16 : t.row * kSize, head = bytes(t.head);
    const int box[] = {kPanel, box_rows, 1, 1, 1};
    heads = t.head ? heads : 1;
    if (!p.cu_seqlens_q)
      return encode_boxes<5>(to, type, t.data, {dim, rows, heads, t.batch ? p.batch : 1, 1},
                             {row, head, bytes(t.batch), 16}, box, CU_TENSOR_MAP_SWIZZLE_128B);
    if (rows > kEnd || row >= kBack) return cudaErrorInvalidValue;
    return encode_boxes<5>(to, type, t.data, {dim, kEnd, heads, kAny, kAny}, {row, head, row, kBack - row}, box,
                           CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (auto e = operand(a.q, p.q, p.head_dim, p.rows, p.heads, Config::kM)) return e;
  if (auto e = operand(a.k, p.k, p.head_dim, p.keys, p.kv_heads, Config::kN)) return e;
  if (auto e = operand(a.v, p.v, p.value_dim, p.keys, p.kv_heads, Config::kN)) return e;
  if (auto e = allow_shared<attention_wgmma_kernel<Config>>(kShared)) return e;
  const unsigned grid = static_cast<unsigned>(std::min<int64_t>(a.blocks, p.device.sms));
  attention_wgmma_kernel<Config><<<grid, Config::kThreads, kShared, stream>>>(a);
  return cudaGetLastError();
}

// Keys of a block, by the columns of v. Instructions per score in the main loop: 6.6 at 64 columns, 7.0 at 96, 7.4 at
// 128, 8.6 at 192, 11.5 at 256; 7.7 at 192 with 128 of v. Of the consumers' registers (240 with two warpgroups, 160
// with three) a thread's accumulators take v / 2, its scores keys / 2 and p keys / 4; tile, pipelines and softmax take
// about 40.
constexpr int block_keys(int v, bool modified) {
  // Shared memory binds: q and two stages fill it. Score modifiers need registers.
  if (v == 256) return modified ? 64 : 80;
  if (v == 192) return modified ? 80 : 112;
  // At 96 and 128 columns 176 keys would fit, with 6.7 instructions per score instead of 7.4. But blocks of 128 end
  // where the rows of a causal tile end; with 2048 keys, blocks of 176 compute 7 % more scores. At 64 columns 160 keys
  // would spill 404 bytes.
  return 128;
}

// At 64 columns there are enough registers for three consumer warpgroups, except with score modifiers.
template <Dtype T, int D, int V, bool Modified>
using HeadDimConfig = WgmmaAttentionConfig<T, D, V, Modified, V == 64 && !Modified ? 3 : 2, block_keys(V, Modified)>;

namespace {

cudaError_t launch_any(const AttentionParams& p, cudaStream_t stream) {
  return launch_instance(p, [&](auto instance) {
    using I = decltype(instance);
    return launch_wgmma<HeadDimConfig<I::kT, I::kD, I::kV, I::kModified>>(p, stream);
  });
}

const AttentionKernel kernels[] = {{.arch = sm_90a, .launch = launch_any}};
const AttentionKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
