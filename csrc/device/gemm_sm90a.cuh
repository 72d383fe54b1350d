#pragma once
// GEMM on wgmma for sm_90a: int8, e4m3, and 8-bit weights times 16-bit activations. Blocks are persistent: each
// computes tile after tile of the output. One producer thread loads 128 of K at a time by TMA, which zero-fills outside
// the matrices, into a pipeline of stages. Two consumer warpgroups run the mainloop, with operands in shared memory or,
// upconverted, in registers (w8a16_gemm_sm90a.cu), and the epilogue of a tile while the producer loads the next one's
// stages.
#include "device/cluster_sums.cuh"
#include "device/cluster_tiles.cuh"
#include "device/dependent_launch.cuh"
#include "device/fragment_epilogue.cuh"
#include "device/fragments.cuh"
#include "device/gemm_operands.cuh"
#include "device/pipeline.cuh"
#include "device/ptx_sm90a.cuh"
#include "device/shared_bytes.cuh"
#include "device/swapped_epilogue.cuh"
#include "device/tma_map.h"
#include "device/wgmma.cuh"

namespace forwardpass {

// What a kernel's tile is made of. Its two consumer warpgroups have 64 rows each; a tile of fewer than 128 rows is
// computed as its transpose: the 64 rows of a wgmma come from b, and the N of the instruction is all rows of a.
struct WgmmaTile {
  int m, n;  // of the output, what a block computes
  int stages;
  int stage_k = kScaleBlock;  // of K, in a stage; as many bytes of a's rows
};

template <class Config>
struct QuantizingEpilogue;
// The epilogue of a Config.
template <class Config, bool kSwapAB>
struct WgmmaEpilogue {
  using type = std::conditional_t<Config::kTransposed, CachedEpilogue<false>, QuantizingEpilogue<Config>>;
};
template <class Config>
struct WgmmaEpilogue<Config, true> {  // outputs have the type of the operand of 16 bits
  using type = std::conditional_t<(Config::kN < kChunkRows), CachedEpilogue<true>,
                                  SwappedEpilogue<Config::Element::X, Config::kTilesN>>;
};

// Mainloop_: a consumer's, of those below, or of a file that has its own.
template <class Element_, WgmmaTile kTile, template <class> class Mainloop_>
struct WgmmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = kTile.m, kN = kTile.n, kStages = kTile.stages, kConsumers = 2;
  static constexpr int kThreads = 128 * (1 + kConsumers), kWarps = 4 * kConsumers;  // kWarps: of the consumers
  static constexpr bool kTransposed = kM < 128;
  static constexpr int kConsumersM = kTransposed ? 1 : kConsumers;  // that the rows are divided among; else the columns
  static constexpr int kConsumerM = kM / kConsumersM, kConsumerN = kN * kConsumersM / kConsumers;
  static_assert((kTransposed ? kConsumerN : kConsumerM) == ptx::kWgmmaRows);
  // Of a consumer warpgroup, n8 tiles of the wgmma's b: all, and those of one group of wgmmas. Promotion leaves
  // registers for 64 partial accumulators beside 128, so that the columns are computed in two passes then.
  static constexpr int kTilesN = (kTransposed ? kConsumerM : kConsumerN) / 8,
                       kPasses = Element::kPromoted && kTilesN == 32 ? 2 : 1, kPassTiles = kTilesN / kPasses;
  static constexpr int kStageK = kTile.stage_k, kSteps = kStageK / 32;
  // The threads among which a multiprocessor's registers are divided: at launch each of 384 has 168. Tiles of few rows
  // take 128, and leave a quarter: to the quantisation before, beside whose blocks these can then begin, and the next
  // kernel. setmaxnreg moves them: 128 * 24 + 256 * 240 are as many as 384 * 168, with 176 no more than 384 * 128.
  static constexpr int kBoundThreads = kTransposed ? 512 : kThreads;
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = kTransposed ? 176 : 240;
  // A row of a box is one atom of the swizzle: of b, of which there may be several in a stage, 128 bytes; of a all that
  // it has in a stage, 64 or 128.
  static constexpr int kBoxBytes = 128, kBoxes = kStageK * Element::kSizeB / kBoxBytes;
  static_assert(kStageK == 128 || kStageK == 64);
  static_assert(!Element::kPromoted || kStageK == kScaleBlock, "promotion is once a stage");
  // Larger tiles spill with the code of cluster sums; wider ones are not chosen where there are few.
  static constexpr bool kClusterSums = !kIsGrouped<Element> && kN <= (Element::kSwapAB ? 64 : 128);
  // Whether the first stages' b may be loaded before earlier kernels have ended, if it is what none of them writes.
  static constexpr bool kLoadsEarly = kClusterSums && !Element::kSwapAB;

  // Its outputs in groups of 128 columns, all of which a tile has.
  static constexpr bool kQuantizes =
      Element::kPromoted && !kIsGrouped<Element> && !kTransposed && kN % kScaleBlock == 0;

  // Of a grouped GEMM, at most: a tile of 128 x 256 leaves no more shared memory.
  static constexpr int kExperts = !kIsGrouped<Element> ? 0 : kM * kN > 128 * 192 ? 384 : 512;

  using Schedule = std::conditional_t<kIsGrouped<Element>, GroupedTiles<WgmmaConfig>, PersistentTiles<WgmmaConfig>>;
  __device__ static uint32_t rank() { return ptx::cluster_rank(); }
  // A stage's parts: its a and the b of the first pass, the b of the second.
  using Pipeline = forwardpass::Pipeline<kStages, kPasses>;
  using Accumulators = Fragments<Acc, 1, kTilesN, ptx::kWgmmaRows>;
  using Mainloop = Mainloop_<WgmmaConfig>;
  using Epilogue = typename WgmmaEpilogue<WgmmaConfig, Element::kSwapAB>::type;

  struct Stage {
    uint8_t a[kM][kStageK], b[kBoxes][kN][kBoxBytes];
  };
  // The factors by which a stage's accumulators are promoted: one per row of a; for b two, those of gate and up, or of
  // the first and the second block of columns. TMA writes at multiples of 128 bytes, at least 16 bytes: room that the
  // barriers take, as four stages of 128 x 256 with their scales and staging buffers are 227 KB.
  struct Scales {
    alignas(128) float a[kM];
    alignas(128) float b[4];
    PipelineBarriers<kStages, kPasses> barriers;  // those of the first stage's scales are used
    alignas(128) float next_b[4];
  };
  static constexpr int kScaleBytes = sizeof(Scales::a) + sizeof(Scales::b) + sizeof(Scales::next_b);
  struct SharedStorage {
    Stage stage[kStages];
    Scales scales[Element::kPromoted ? kStages : 1];
    typename Epilogue::Storage staging[kWarps];
    [[no_unique_address]] ExpertStorage<kExperts> experts;
    __device__ auto& barriers() { return scales[0].barriers; }
  };
  static constexpr int kStageUnits = sizeof(Stage) / ptx::kDescriptorUnit;
  // Rows of b that a TMA load has: those of a pass, or a block's share in a cluster.
  __host__ __device__ static constexpr int share_of_b(int cluster) {
    return kN / (cluster > kPasses ? cluster : kPasses);
  }
};

// Where the block scales of b are in the one row that TMA sees: where they begin, the distance from one row of blocks
// to the next, and from the first to the second scale of a stage.
struct BlockOrder {
  int first, row, next;
};

struct WgmmaArguments {
  GemmOutput out;
  TileMap map;         // of clusters
  bool b_first;        // the operation's b may be read before earlier kernels have ended
  bool cluster_sums;   // the blocks of a cluster have all splits of its tiles
  bool scaled, gated;  // scaled: with block scales
  BlockOrder order;
  Dtype a_dtype;           // w8a16_gemm: of the weight
  const float* row_scale;  // w8a16_gemm: its 1 x 128 scales, [rows of a, K blocks]; null: none
  CUtensorMap a, b, a_scale, b_scale;
  Groups groups;
};

// Block scales of the experts before the tile's.
__device__ inline int blocks_before(const WgmmaArguments&, const GemmTile&) { return 0; }
__device__ inline int blocks_before(const WgmmaArguments& p, const GroupTile& tile) {
  const int columns = ptx::unknown(static_cast<int>(p.out.columns));  // else the product, the same in all tiles, spills
  return tile.expert * (p.gated ? 2 * p.order.next : (columns + kScaleBlock - 1) / kScaleBlock * p.order.row);
}

// The producer's main function. A block loads its own rows of a, and its share of the rows of b for all blocks of its
// cluster that have the same split: with two passes those of one of them. So a stage's loads are issued as its parts
// become empty, which spreads them over its time: as a burst they keep wgmma from shared memory, of which it needs half
// (fp8 128 x 256, modelled: 1277 clocks a stage as one burst, 1159 in parts).
template <class Config>
__device__ inline void producer(const WgmmaArguments& p, typename Config::SharedStorage& s) {
  const typename Config::Schedule schedule(p, s);
  const int bytes = sizeof(typename Config::Stage) + (p.scaled ? Config::kScaleBytes : 0);
  const int share = Config::share_of_b(p.map.share());
  typename Config::Pipeline pipeline(s.barriers());
  const auto load_b = [&](const GemmTile& tile, int stage, int k, uint32_t full) {
    const int row = static_cast<int>(tile.b_row);
    int part = schedule.rank;
    do {
      if (Config::kPasses > 1 && part > 0) pipeline.wait_empty(part);
#pragma unroll
      for (int box = 0; box < Config::kBoxes; ++box) {
        const uint32_t b = ptx::shared_address(s.stage[stage].b[box][part * share]);
        const int b_k = k + box * (Config::kStageK / Config::kBoxes);
        if (p.map.share_bits == 0) {
          ptx::tma_load(b, p.b, b_k, row + part * share, full);
        } else {
          const uint16_t sharing = ((1 << p.map.share()) - 1) << (schedule.split << p.map.share_bits);
          ptx::tma_load_multicast(b, p.b, b_k, row + part * share, full, sharing);
        }
      }
    } while (Config::kPasses > 1 && p.map.share_bits == 0 && ++part < Config::kPasses);
  };
  int ahead = 0;  // stages whose b is under way
  if constexpr (Config::kLoadsEarly)
    if (p.b_first) {
      const GemmTile tile = schedule.first();
      auto early = pipeline;
      for (; ahead < min(Config::kStages, tile.slices(Config::kStageK)); ++ahead, early.advance())
        load_b(tile, ahead, static_cast<int>(tile.k) + ahead * Config::kStageK, early.acquire(bytes));
      ptx::wait_for_earlier_kernels();
    }
  schedule.for_each([&](const auto& tile) {
    const int row = static_cast<int>(tile.row), column = static_cast<int>(tile.column),
              b_block = p.order.first + column / (p.gated ? 2 * kScaleBlock : kScaleBlock) * p.order.row +
                        blocks_before(p, tile);
    const int end = static_cast<int>(tile.k_end);
    for (int k = static_cast<int>(tile.k); k < end; k += Config::kStageK, pipeline.advance()) {
      const bool has_b = Config::kLoadsEarly && ahead-- > 0;
      const uint32_t full = has_b ? pipeline.full(pipeline.stage) : pipeline.acquire(bytes);
      ptx::tma_load(ptx::shared_address(s.stage[pipeline.stage].a), p.a, k, row, full);
      if (Config::Element::kPromoted && p.scaled) {
        const int block = k / kScaleBlock;
        auto& scales = s.scales[pipeline.stage];
        ptx::tma_load(ptx::shared_address(scales.a), p.a_scale, row, block, full);
        ptx::tma_load(ptx::shared_address(scales.b), p.b_scale, b_block + block, 0, full);
        ptx::tma_load(ptx::shared_address(scales.next_b), p.b_scale, b_block + block + p.order.next, 0, full);
      }
      if (!has_b) load_b(tile, pipeline.stage, k, full);
    }
  });
}

// A consumer warpgroup's part of the tile, and that of this warp.
template <class Config>
struct ConsumerPlace {
  int group_row, group_column;  // the warpgroup's first
  int row, column;              // the warp's first

  __device__ explicit ConsumerPlace(int warpgroup)
      : group_row(warpgroup % Config::kConsumersM * Config::kConsumerM),
        group_column(warpgroup / Config::kConsumersM * Config::kConsumerN) {
    const int in_group = uniform(static_cast<int>(threadIdx.x) / 32 % 4) * 16;
    row = group_row + (Config::kTransposed ? 0 : in_group);
    column = group_column + (Config::kTransposed ? in_group : 0);
  }
};

// A consumer's side of the pipeline, whose stages other blocks of the cluster fill too.
template <class Config>
struct ConsumerPipeline : Config::Pipeline {
  // First empty barrier of that one of the blocks sharing b whose number is this lane, or 0: its producer fills this
  // block's stages too.
  uint32_t empty;

  __device__ ConsumerPipeline(const TileMap& map, typename Config::SharedStorage& s) : Config::Pipeline(s.barriers()) {
    const uint32_t lane = threadIdx.x % 32, first = ptx::cluster_rank() & ~(map.share() - 1);
    const uint32_t mapped =
        ptx::map_shared(ptx::shared_address(s.barriers().empty), first + min(lane, map.share() - 1));
    empty = uniform(lane < map.share() ? mapped : 0, lane);
    this->barriers = uniform(this->barriers);
  }
  __device__ void release(int stage, int part = 0) const {
    if (!empty) return;
    // The part is an offset in the instruction then; else the compiler takes five instructions for the second one.
    const uint32_t first = ptx::unknown(empty + stage * kBarrierBytes);
    ptx::mbarrier_arrive_cluster(first + part * Config::kStages * kBarrierBytes);
  }
};

// The wgmmas of operands that are both in shared memory.
template <class Config>
struct SharedOperands {
  uint32_t a, b;  // low halves of the wgmma descriptors of both operands in the first stage

  __device__ SharedOperands(typename Config::SharedStorage& s, const ConsumerPlace<Config>& place) {
    const uint8_t *rows_a = s.stage[0].a[place.group_row], *rows_b = s.stage[0].b[0][place.group_column];
    a = uniform(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_b : rows_a)));
    b = uniform(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_a : rows_b)));
  }
  __device__ void load(int) {}
  // One group of wgmmas: 64 rows by the 128 of K of a stage.
  template <class Row>
  __device__ void mma(Row& acc, int stage, int, bool accumulate) const {
    const uint32_t first = stage * Config::kStageUnits;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint32_t k = step * 32 / ptx::kDescriptorUnit;
      ptx::wgmma_k32(acc, a + first + k, b + first + k, accumulate || step > 0);
    }
  }
};

// Those whose a is in registers. From shared memory each group of wgmmas would read it anew: of a stage of 128 x 256 in
// two passes 96 KB are read instead of 80, which with the 48 that TMA writes take 1152 clocks, of which the tensor
// cores work 1024.
template <class Config>
struct RegisterOperands {
  uint32_t a;  // address of this lane's 16 bytes in the first stage
  uint32_t b;  // low half of the wgmma descriptor in the first stage
  uint32_t rows[Config::kSteps][4];

  __device__ RegisterOperands(typename Config::SharedStorage& s, const ConsumerPlace<Config>& place) {
    using Rows = SwizzledRows<Config::kStageK>;
    const int lane = threadIdx.x % 32;
    a = uniform(ptx::shared_address(s.stage[0].a[place.row]) + Rows::offset(lane % 16, lane / 16), lane);
    b = uniform(ptx::descriptor(ptx::shared_address(s.stage[0].b[0][place.group_column])));
  }
  // A stage's a, once it is full and the wgmmas of the stage before have completed.
  __device__ void load(int stage) {
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step)
      ptx::ldmatrix_x4(rows[step], (a + stage * sizeof(typename Config::Stage)) ^ step * 32);
  }
  template <class Row>
  __device__ void mma(Row& acc, int stage, int pass, bool accumulate) const {
    const uint32_t first =
        b + stage * Config::kStageUnits + pass * Config::kPassTiles * 8 * Config::kStageK / ptx::kDescriptorUnit;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step)
      ptx::wgmma_k32(acc, rows[step], first + step * 32 / ptx::kDescriptorUnit, accumulate || step > 0);
  }
};

// The mainloop with exact accumulators: the wgmmas of a stage run while the next ones are issued, and the stage is
// released when they have completed. begin_epilogue(): Epilogue::begin, whose loads take as long as two stages (behind
// one, modelled: int8 1024 x 4096 x 1024 takes 15917 clocks, behind two 15272).
template <class Config>
struct ExactMainloop {
  ConsumerPipeline<Config> pipeline;
  SharedOperands<Config> operands;

  __device__ ExactMainloop(const WgmmaArguments& p, typename Config::SharedStorage& s,
                           const ConsumerPlace<Config>& place)
      : pipeline(p.map, s), operands(s, place) {}
  template <class F>
  __device__ void operator()(const GemmTile& tile, typename Config::Accumulators& acc, F begin_epilogue) {
    const int slices = tile.slices(Config::kStageK);
    int before = pipeline.stage;
    const auto multiply = [&](bool accumulate) {
      pipeline.wait_full();
      ptx::wgmma_fence();
      operands.mma(acc[0], pipeline.stage, 0, accumulate);
      ptx::wgmma_commit();
    };
    const auto release_before = [&] {
      ptx::wgmma_wait<1>();
      pipeline.release(before);
      before = pipeline.stage;
      pipeline.advance();
    };
    multiply(false);
    pipeline.advance();
    if (slices > 1) multiply(true);
    begin_epilogue();
    if (slices > 1) release_before();
#pragma unroll 1
    for (int left = slices - 2; left > 0; --left) {
      multiply(true);
      release_before();
    }
    ptx::wgmma_wait<0>();
    pipeline.release(before);
  }
};

// The mainloop with promotion: after each stage the partial accumulators, times the stage's scales, are added to the
// fp32 ones. While one warpgroup promotes them, the other's wgmmas run.
template <class Config>
struct PromotingMainloop {
  // A warpgroup's columns are not whole blocks of b's scales: 192, which begin with a block or in the middle of one.
  static constexpr bool kStraddles = !Config::kTransposed && Config::kConsumerN % kScaleBlock != 0;
  // The factors for a thread's accumulators of a stage: for each pair of rows of a that the thread has, the scale of
  // either row times those of b: for each pass of even and of odd n8 tiles (or, transposed, of a thread's first row and
  // of the row eight below), which differ if they are gates and ups. Of 192 columns those of the first 64, of the last,
  // and of the 64 in the middle.
  static constexpr int kPairs = Config::kTransposed ? Config::kTilesN : 1, kSets = kStraddles ? 3 : 2 * Config::kPasses;
  struct Factors {
    float factor[kPairs][2][kSets];
    __device__ float of(int j, int e) const {
      if (Config::kTransposed) return factor[j][e % 2][e / 2];
      return factor[0][e / 2][!kStraddles ? j / Config::kPassTiles * 2 + j % 2 : j < 8 ? 0 : j < 16 ? 2 : 1];
    }
  };
  using Operands = std::conditional_t<Config::kPasses == 1, SharedOperands<Config>, RegisterOperands<Config>>;
  ConsumerPipeline<Config> pipeline;
  Operands operands;
  // In the first stage: scales of a from this thread's first row on; of b those of the sets.
  uint32_t a_scale, b_scale[kSets];

  __device__ PromotingMainloop(const WgmmaArguments& p, typename Config::SharedStorage& s,
                               const ConsumerPlace<Config>& place)
      : pipeline(p.map, s), operands(s, place) {
    const int first = place.row + (Config::kTransposed ? accumulator_column(0) : accumulator_row(0));
    a_scale = uniform(ptx::shared_address(&s.scales[0].a[first]), threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kSets; ++i) {
      const bool next = p.gated || kStraddles ? i % 2 : i / 2;
      b_scale[i] = uniform(ptx::shared_address(next ? s.scales[0].next_b : s.scales[0].b));
    }
  }
  __device__ Factors load_factors() const {
    const uint32_t first = pipeline.stage * sizeof(typename Config::Scales);
    float b[kSets];
#pragma unroll
    for (int i = 0; i < kSets; ++i) b[i] = ptx::load_shared(b_scale[i] + first);
    Factors factors;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = ptx::load_shared(a_scale + first + (Config::kTransposed ? i * 8 + j : j * 8) * sizeof(float));
#pragma unroll
        for (int k = 0; k < kSets; ++k) factors.factor[i][j][k] = a * b[k];
      }
    return factors;
  }
  template <class F>
  __device__ void operator()(const GemmTile& tile, typename Config::Accumulators& acc, F begin_epilogue) {
    begin_epilogue();  // in the loop its instructions would be among every stage's
    acc.clear();
    if (kStraddles) b_scale[kSets - 1] = tile.column % kScaleBlock == 0 ? b_scale[0] : b_scale[1];
    const int slices = tile.slices(Config::kStageK);
    pipeline.wait_full();
    operands.load(pipeline.stage);
#pragma unroll 1
    for (int slice = 1; slice <= slices; ++slice) {
      Factors factors;
#pragma unroll
      for (int pass = 0; pass < Config::kPasses; ++pass) {
        typename Config::Acc partial[Config::kPassTiles][4];
        ptx::wgmma_fence();
        operands.mma(partial, pipeline.stage, pass, false);
        ptx::wgmma_commit();
        if (pass == 0) factors = load_factors();  // while the wgmmas run
        ptx::wgmma_wait<0>();
        pipeline.release(pipeline.stage, pass);
        if (pass == Config::kPasses - 1) {
          pipeline.advance();
          if (slice < slices) {  // what is loaded arrives during the promotion
            pipeline.wait_full();
            operands.load(pipeline.stage);
          }
        }
#pragma unroll
        for (int j = 0; j < Config::kPassTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int all = pass * Config::kPassTiles + j;
            acc[0][all][e] = fmaf(partial[j][e], factors.of(all, e), acc[0][all][e]);
          }
      }
    }
  }
};

// The epilogue of a kernel that may have to quantise its outputs in groups of 128, all of whose columns are a warp's.
template <class Config>
struct QuantizingEpilogue : FragmentEpilogue<typename Config::Accumulators, Config::Element::kPromoted> {
  using Base = FragmentEpilogue<typename Config::Accumulators, Config::Element::kPromoted>;
  using Base::Base;
  __device__ void operator()(typename Config::Accumulators& acc, const GemmTile& tile, int row, int column) const {
    if constexpr (Config::kQuantizes) {
      const Epilogue& e = this->out.epilogue;
      if (e.group_scale) {
        const auto direct = this->direct(tile, row, column);
        if (direct.empty()) return;
        if (!is_gated(e.activation)) {
          direct.template quantize<false>(acc, this->a_scale);
        } else if constexpr (Config::kConsumerN == 2 * kScaleBlock) {
          direct.template quantize<true>(acc, this->a_scale);
        }
        return;
      }
    }
    Base::operator()(acc, tile, row, column);
  }
};

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kBoundThreads, 1)
    gemm_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(p.a);
    ptx::prefetch_tensor_map(p.b);
    s.barriers().init(Config::kWarps * p.map.share());
    ptx::fence_mbarrier_init();
  }
  if (Config::Element::kPromoted && !p.scaled) {
    for (auto& scales : s.scales) {
      if (threadIdx.x < Config::kM) scales.a[threadIdx.x] = 1;
      if (threadIdx.x == 0) scales.b[0] = scales.next_b[0] = 1;
    }
  }
  if constexpr (kIsGrouped<typename Config::Element>)
    if (threadIdx.x < 32) {
      ptx::wait_for_earlier_kernels();
      typename Config::Schedule(p, s).list.make(static_cast<int>(p.out.rows));
    }
  __syncwarp();
  ptx::cluster_sync();
  const int warpgroup = uniform(threadIdx.x / 128);
  // By whole warps: one lane would not get ahead of others that wait.
  if (!(Config::kLoadsEarly && p.b_first) || warpgroup != Config::kConsumers) ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();

  if (warpgroup == Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == Config::kConsumers * 128) producer<Config>(p, s);
    __syncwarp();
    if (p.cluster_sums) ptx::cluster_sync();  // as in ClusterSums::add
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    const ConsumerPlace<Config> place(warpgroup);
    typename Config::Mainloop mainloop(p, s, place);
    constexpr bool kGrouped = kIsGrouped<typename Config::Element>;
    OutputOf<typename Config::Element> out(p.out);
    typename Config::Epilogue epilogue(s, out);
    const typename Config::Schedule schedule(p, s);
    schedule.for_each([&](const auto& tile) {
      if constexpr (kGrouped) {
        out.take(tile, schedule.list);
        epilogue.find_staging(s);
      }
      typename Config::Accumulators acc;
      mainloop(tile, acc, [&] { epilogue.begin(tile, place.row, place.column); });
      if constexpr (Config::kClusterSums)
        if (p.cluster_sums) return ClusterSums<Config>::stage(acc, s, place.row, place.column);
      epilogue(acc, tile, place.row, place.column);
    });
    if constexpr (Config::kClusterSums)
      if (p.cluster_sums) ClusterSums<Config>::add(s, p.out, p.map);  // in the loop its registers would spill
    if constexpr (kGrouped) {
      const int warp = uniform(threadIdx.x / 32);
      fill_unowned_rows(schedule.list, p.out, blockIdx.x * Config::kWarps + warp, gridDim.x * Config::kWarps);
    }
  }
  ptx::cluster_sync();  // other blocks of the cluster may still arrive at this block's barriers, and read its sums
}

// How many clusters of `size` blocks run at once. Asked for once on each device, or MIG slice of one.
template <class Config>
cudaError_t resident_clusters(const Device& device, int size, int& count) {
  constexpr int kDevices = 64;                                       // beyond, each time
  static std::atomic<uint64_t> known[kDevices][kClusterBlocks + 1];  // the device's multiprocessors above the count
  const bool keep = device.index < kDevices;
  if (keep) {
    const uint64_t answer = known[device.index][size].load(std::memory_order_relaxed);
    if (answer >> 32 == static_cast<uint64_t>(device.sms)) return count = static_cast<int>(answer), cudaSuccess;
  }
  int before = 0;
  if (auto e = cudaGetDevice(&before)) return e;
  if (auto e = cudaSetDevice(device.index)) return e;
  const auto query = [&] {
    constexpr int kShared = sizeof(typename Config::SharedStorage);
    if (auto e = allow_shared<gemm_wgmma_kernel<Config>>(kShared)) return e;
    const Launch launch{.grid = size, .block = Config::kThreads, .shared = kShared, .cluster = size};
    return with_config(launch, nullptr, [&](const cudaLaunchConfig_t& config) {
      return cudaOccupancyMaxActiveClusters(&count, gemm_wgmma_kernel<Config>, &config);
    });
  };
  const cudaError_t error = query();
  if (auto e = cudaSetDevice(before)) return e;
  if (!error && keep)
    known[device.index][size] = static_cast<uint64_t>(device.sms) << 32 | static_cast<uint32_t>(count);
  return error;
}

template <class Config>
cudaError_t launch_gemm_wgmma(const GemmParams& p, cudaStream_t stream) {
  using Element = typename Config::Element;
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int share = p.choice.cluster, share_bits = share - 1;  // one block or two
  const bool cluster_sums = p.choice.cluster_sums;
  const int64_t splits = p.choice.splits, cluster = cluster_sums ? share * splits : share;
  const Matrix &a = Element::kSwapAB ? p.b : p.a, &b = Element::kSwapAB ? p.a : p.b;
  const bool scaled = p.blocks.a, gated = is_gated(p.epilogue.activation);
  constexpr bool kGrouped = kIsGrouped<Element>;
  const int64_t rows = kGrouped ? most_tile_rows(p.groups, a.rows, Config::kM * share)
                                : ceil_div(ceil_div(a.rows, Config::kM), share),
                columns = kGrouped ? p.columns() : b.rows;
  WgmmaArguments arguments{.out = GemmOutput(p),
                           .map = TileMap(rows, ceil_div(columns, Config::kN), cluster_sums ? 1 : splits, a.columns,
                                          p.choice.split_k, share_bits),
                           .b_first = p.b_first,
                           .cluster_sums = cluster_sums,
                           .scaled = scaled,
                           .gated = gated,
                           .a_dtype = a.dtype,
                           .row_scale = scaled ? nullptr : p.blocks.b,
                           .groups = p.groups};
  const auto operand = [](CUtensorMap& to, const Matrix& m, int box_rows, int box_bytes) {
    const int64_t size = size_of(m.dtype);
    return encode_boxes(to, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, m.data, m.rows,
                        m.columns, m.stride * size, box_rows, box_bytes / size,
                        box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
  };
  if (auto e = operand(arguments.a, a, Config::kM, Config::kStageK)) return e;
  if (auto e = operand(arguments.b, b, Config::share_of_b(share), Config::kBoxBytes)) return e;
  if (scaled) {
    const int64_t depth = ceil_div(p.a.columns, kScaleBlock), next = gated ? p.blocks.up_offset : depth,
                  of_one = block_scales_of(p.blocks, gated, p.columns(), p.a.columns),
                  count = kGrouped ? p.groups.experts * of_one : of_one;
    // The row that TMA sees begins at a multiple of 16 bytes; the first scale may lie behind that.
    const auto address = reinterpret_cast<uintptr_t>(p.blocks.b);
    const int first = static_cast<int>(address % 16 / sizeof(float));
    arguments.order = {first, static_cast<int>(depth), static_cast<int>(next)};
    const auto scales = [](CUtensorMap& to, const void* data, int64_t rows, int64_t columns, int64_t stride, int box) {
      return encode_boxes(to, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data, rows, columns, stride * 4, 1, box,
                          CU_TENSOR_MAP_SWIZZLE_NONE);
    };
    if (auto e = scales(arguments.a_scale, p.blocks.a, depth, p.a.rows, p.blocks.a_stride, Config::kM)) return e;
    if (auto e = scales(arguments.b_scale, reinterpret_cast<const void*>(address / 16 * 16), 1, first + count,
                        ceil_div(first + count, 4) * 4, 4))
      return e;
  }
  auto kernel = gemm_wgmma_kernel<Config>;
  if (auto e = allow_shared<gemm_wgmma_kernel<Config>>(kShared)) return e;
  // A cluster that adds its splits has one tile: its stages become the place for the sums.
  const int64_t tiles = arguments.map.tiles;
  const Launch launch{.grid = (cluster_sums ? tiles : std::min(p.choice.blocks / cluster, tiles)) * cluster,
                      .block = Config::kThreads,
                      .shared = dynamic_shared<Config>(p),
                      .cluster = static_cast<int>(cluster),
                      .dependent = true};
  if (auto e = launch_kernel(kernel, launch, stream, arguments)) return e;
  return reduce_split_k(p, Element::kAcc, stream);
}

}  // namespace forwardpass
