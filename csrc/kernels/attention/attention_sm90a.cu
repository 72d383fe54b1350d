// attention on wgmma. A block computes tile after tile of 64 rows a warpgroup. One thread loads: q, and block after
// block of keys and values, by TMA. Of each warpgroup that multiplies, q k^T of the next block is under way while the
// softmax of this one is computed, and p v with it, p straight from registers.
#include "device/ring.cuh"
#include "device/shared_bytes.cuh"
#include "device/softmax.cuh"
#include "device/tma_map.h"
#include "device/wgmma.cuh"
#include "kernels/attention/attention_instance.cuh"
#include "kernels/attention/attention_kernel.h"
#include "kernels/attention/attention_scores.cuh"

namespace forwardpass {

// Columns of 16 bits that a swizzle of 128 bytes spans.
constexpr int kPanel = 64;

// D, V: columns of q and k, and of v. General: with mask, ALiBi or softcap. Groups: warpgroups that multiply. N: keys
// of a block.
template <Dtype T_, int D, int V, bool General, int Groups, int N>
struct WgmmaAttentionConfig {
  static constexpr Dtype T = T_;
  static constexpr int kD = D, kV = V, kM = 64 * Groups, kN = N, kGroups = Groups, kStages = 2;
  static constexpr bool kGeneral = General;
  static constexpr int kThreads = 128 * (1 + Groups);
  static constexpr int kTiles = N / 8, kOutTiles = V / 8;
  static constexpr int kPanelsD = (D + kPanel - 1) / kPanel, kPanelsV = (V + kPanel - 1) / kPanel;
  // 384 threads get 168 registers each at launch, 512 get 128.
  static constexpr int kLoadRegisters = Groups == 2 ? 24 : 32, kMultiplyRegisters = Groups == 2 ? 240 : 160;
  // Warpgroups take turns in issuing, so that one's softmax is computed while the other's products are. With more
  // columns the products take so much longer that they overlap anyway.
  static constexpr bool kTurns = D <= 128;

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
    StageBarriers<1> q_barriers;
    StageBarriers<kStages> k_barriers, v_barriers;
  };
};

// The rows of an operand as a tensor of five dimensions: dim, row, head, and two that say which sequence.
struct AttentionArguments {
  AttentionParams p;
  unsigned tiles;  // of a head
  int64_t blocks;  // of all
  CUtensorMap q, k, v;
};

// Of sequences one behind the other TMA has to see the end of each: it fills with zeros, and 0 times what follows may
// be NaN. A sequence is put in front of row kEnd, where the tensor ends, by two more dimensions, of which one takes
// back what that adds to the address: addresses are modulo 2^64, and kEnd times (2^34 - row) is -kEnd rows.
constexpr int kEnd = 1 << 30;
constexpr int64_t kBack = int64_t{1} << 34;

struct SequenceOrigin {
  int row, head, at[2];

  // rows: of the sequence, from row `first` on in a tensor of all
  __device__ SequenceOrigin(const AttentionTensor& t, bool packed, int batch, int head, int64_t first, int rows)
      : row(packed ? kEnd - rows : 0),
        head(t.head ? head : 0),
        at{packed    ? static_cast<int>(first) + rows
           : t.batch ? batch
                     : 0,
           packed ? kEnd : 0} {}
  // All panels of a block of rows.
  template <int kPanels, int kRows>
  __device__ void load(uint16_t (&to)[kPanels][kRows][kPanel], const CUtensorMap& map, int r, uint32_t barrier) const {
#pragma unroll
    for (int i = 0; i < kPanels; ++i) {
      const int from[5] = {i * kPanel, row + r, head, at[0], at[1]};
      ptx::tma_load(ptx::shared_address(to[i]), map, from, barrier);
    }
  }
};

// f(tile, blocks of its keys) for each tile of this block. Back and forth through the grid, so that each block gets of
// the long and of the short ones.
template <class Config, class F>
__device__ inline void each_tile(const AttentionArguments& a, F f) {
  for (unsigned round = 0;; ++round) {
    const int64_t block = int64_t{round} * gridDim.x + (round % 2 ? gridDim.x - 1 - blockIdx.x : blockIdx.x);
    if (block >= a.blocks) return;
    AttentionTile tile;
    if (tile.find(a.p, Config::kM, a.tiles, static_cast<unsigned>(block)))
      f(tile, KeyBlocks(a.p, tile, Config::kM, Config::kN));
  }
}

template <class Config>
__device__ inline void load(const AttentionArguments& a, typename Config::SharedStorage& s) {
  Stage<1> q(s.q_barriers);
  Stage<Config::kStages> k(s.k_barriers), v(s.v_barriers);
  each_tile<Config>(a, [&](const AttentionTile& t, const KeyBlocks& blocks) {
    if (blocks.end <= blocks.begin) return;
    const bool packed = a.p.cu_seqlens_q;
    const SequenceOrigin rows(a.p.q, packed, t.batch, t.head, t.first_row, t.rows),
        k_keys(a.p.k, packed, t.batch, t.kv_head(a.p), t.first_key, t.keys),
        v_keys(a.p.v, packed, t.batch, t.kv_head(a.p), t.first_key, t.keys);
    const auto load_k = [&](int block) {
      k_keys.load(s.k[k.stage].panel, a.k, block * Config::kN, k.fill(sizeof(typename Config::Key)));
      k.advance();
    };
    const auto load_v = [&](int block) {
      v_keys.load(s.v[v.stage].panel, a.v, block * Config::kN, v.fill(sizeof(typename Config::Value)));
      v.advance();
    };
    rows.load(s.q, a.q, t.row, q.fill(sizeof s.q));
    q.advance();
    // as they are multiplied
    int block = blocks.end - 1;
    load_k(block);
    for (; block > blocks.begin; --block) {
      load_k(block - 1);
      load_v(block);
    }
    load_v(block);
  });
}

// A warpgroup's side of the stages, and what it multiplies.
template <class Config>
struct AttentionMultiplier {
  using Scores = float[1][Config::kTiles][4];
  using Sums = float[1][Config::kOutTiles][4];
  using Weights = uint32_t[Config::kN / 16][4];
  Stage<1> q;
  Stage<Config::kStages> k, v;
  uint32_t q_rows, k_rows, v_rows;  // low halves of the descriptors: of this warpgroup's rows, in the first stage
  int group;

  static constexpr int kStep = 16 * sizeof(uint16_t) / ptx::kDescriptorUnit;  // 16 columns
  static constexpr int kRow = kPanel * sizeof(uint16_t) / ptx::kDescriptorUnit;

  __device__ AttentionMultiplier(typename Config::SharedStorage& s, int group)
      : q(s.q_barriers), k(s.k_barriers), v(s.v_barriers), group(group) {
    q_rows = kept(ptx::descriptor(ptx::shared_address(s.q[0][group * 64])));
    k_rows = kept(ptx::descriptor(ptx::shared_address(s.k[0].panel)));
    v_rows = kept(ptx::descriptor(ptx::shared_address(s.v[0].panel), Config::kN * kPanel * sizeof(uint16_t)));
  }
  __device__ void multiply_q_k(Scores& scores) {
    k.wait();
    begin_turn();
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
  __device__ void multiply_p_v(Sums& sums, const Weights& p) {
    ptx::wgmma_keep(sums[0]);
    ptx::wgmma_fence();
    const uint32_t at = v_rows + v.stage * (sizeof(typename Config::Value) / ptx::kDescriptorUnit);
#pragma unroll
    for (int i = 0; i < Config::kN / 16; ++i) ptx::wgmma_k16<Config::T, 1>(sums[0], p[i], at + i * 16 * kRow, true);
    ptx::wgmma_commit();
  }
  // A warpgroup waits for the one before it and lets the next one go: barriers 1 and on.
  __device__ void begin_turn() const {
    if (Config::kTurns) ptx::barrier_sync(1 + group, 256);
  }
  __device__ void end_turn() const {
    if (Config::kTurns) ptx::barrier_arrive(1 + (group + 1) % Config::kGroups, 256);
  }
};

// A tile's sums, exchanged between the four lanes that share a row so that each has eight columns of it: 16 bytes.
template <class Config>
__device__ inline void store_rows(const typename AttentionMultiplier<Config>::Sums& o, const AttentionParams& p,
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
__device__ inline void multiply(const AttentionArguments& a, typename Config::SharedStorage& shared, int group) {
  const AttentionParams& p = a.p;
  using Multiplier = AttentionMultiplier<Config>;
  Multiplier m(shared, group);
  const int lane = threadIdx.x % 32;
  if (group == Config::kGroups - 1) m.end_turn();
  each_tile<Config>(a, [&](const AttentionTile& tile, const KeyBlocks& blocks) {
    const int own = tile.row + group * 64 + threadIdx.x / 32 % 4 * 16 + lane / 4;  // of this thread
    const RowBounds<1> bounds(p, tile, own);
    const Scores<1, Config::kTiles> scores(p, tile, own);
    const float scale = Config::kGeneral ? 1 : p.scale * kLog2e;

    OnlineSoftmax<1> softmax;
    typename Multiplier::Sums o = {};
    typename Multiplier::Weights weights;
    RowValues<1> factor;
    const auto attend = [&](int block, auto first, auto masked) {
      constexpr bool kFirst = decltype(first)::value;
      typename Multiplier::Scores s;
      m.multiply_q_k(s);
      const int before = m.v.stage;
      if (!kFirst) {
        rescale(o, factor);
        m.multiply_p_v(o, weights);
        m.v.advance();
      }
      m.end_turn();
      const auto end_p_v = [&] {
        if (kFirst) return;
        ptx::wgmma_wait<0>();
        ptx::wgmma_keep(o[0]);
        m.v.release(before);
      };
      ptx::wgmma_wait<kFirst ? 0 : 1>();
      ptx::wgmma_keep(s[0]);
      m.k.release(m.k.stage);
      m.k.advance();
      const int key = block * Config::kN + lane % 4 * 2;
      if (Config::kGeneral) {
        end_p_v();  // the weights' registers are needed
        scores(s, key);
      }
      if (decltype(masked)::value) bounds(s, key);
      softmax.update(s, scale, factor);
      ptx::wgmma_keep(s[0]);
      // It stands here, not where v is needed, as ptxas moves the wait below it up across anything but a branch: then
      // the softmax would begin when p v has ended.
      m.v.wait();
      if (!Config::kGeneral) end_p_v();
#pragma unroll
      for (int i = 0; i < Config::kN / 16; ++i) pack_operand<Config::T>(weights[i], s[0], i);
    };
    const int begin = kept(blocks.begin), clean_begin = kept(blocks.clean_begin), clean_end = kept(blocks.clean_end);
    int block = kept(blocks.end) - 1;
    if (block >= begin) {
      m.q.wait();
      attend(block--, std::true_type{}, std::true_type{});
#pragma unroll 1
      for (int phase = 0; phase < 2; ++phase) {
        const int stop = phase == 0 ? clean_end : begin;
#pragma unroll 1
        for (; block >= stop; --block) attend(block, std::false_type{}, std::true_type{});
        if (phase == 1) break;
#pragma unroll 1
        for (; block >= clean_begin; --block) attend(block, std::false_type{}, std::false_type{});
      }
      m.q.release(m.q.stage);
      m.q.advance();
      rescale(o, factor);
      m.multiply_p_v(o, weights);
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
    __syncwarp();  // what follows is for whole warps
  });
  if (group == 0) m.begin_turn();  // of the last one that was ended
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
    constexpr int kReaders = 4 * Config::kGroups;
    s.q_barriers.init(kReaders);
    s.k_barriers.init(kReaders);
    s.v_barriers.init(kReaders);
    ptx::fence_mbarrier_init();
  }
  __syncthreads();
  const int warpgroup = kept(threadIdx.x / 128);
  if (warpgroup == Config::kGroups) {
    ptx::setmaxnreg_dec<Config::kLoadRegisters>();
    if (threadIdx.x == Config::kGroups * 128) load<Config>(a, s);
  } else {
    ptx::setmaxnreg_inc<Config::kMultiplyRegisters>();
    multiply<Config>(a, s, warpgroup);
  }
}

template <class Config>
cudaError_t launch_wgmma(const AttentionParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int64_t tiles = row_tiles(p, Config::kM);
  AttentionArguments a{p, static_cast<unsigned>(tiles), tiles * all_heads(p), {}, {}, {}};
  if (a.blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  // A dimension over which an operand is broadcast is left out, and with it a stride of 0, which no document promises.
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

// Keys of a block, by the columns of v. Main loop, instructions a score: 6.6 at 64 columns, 7.0 at 96, 7.4 at 128, 8.6
// at 192, 11.5 at 256; 7.7 at 192 with 128 of v. Of a warpgroup's registers, 240 of two and 160 of three, a thread's
// sums take v / 2, its scores keys / 2 and their weights keys / 4; tile, stages and softmax take some 40.
constexpr int block_keys(int v, bool general) {
  // q and two stages fill the shared memory; what is done to the scores of general ones takes registers.
  if (v == 256) return general ? 64 : 80;
  if (v == 192) return general ? 80 : 112;
  // 176 would fit at 96 and 128 columns, with 6.7 instructions a score in place of 7.4. But blocks of 128 end with the
  // rows of a causal tile, where of 2048 keys those of 176 compute 7 % more scores. At 64, 160 would spill 404 bytes.
  return 128;
}

// At 64 columns three warpgroups have registers enough, unless something is done to the scores.
template <Dtype T, int D, int V, bool General>
using Bucket = WgmmaAttentionConfig<T, D, V, General, V == 64 && !General ? 3 : 2, block_keys(V, General)>;

cudaError_t launch_any(const AttentionParams& p, cudaStream_t stream) {
  return launch_instance(p, [&](auto instance) {
    using I = decltype(instance);
    return launch_wgmma<Bucket<I::kT, I::kD, I::kV, I::kGeneral>>(p, stream);
  });
}

const AttentionKernel kernels[] = {{.arch = sm_90a, .launch = launch_any}};
const AttentionKernels registered(kernels);

}  // namespace forwardpass
