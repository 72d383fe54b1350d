#pragma once
// GEMM on wgmma for sm_90a: int8, e4m3, and 8-bit weights times 16-bit activations. Blocks are persistent: each
// computes tile after tile of the output. One producer thread loads 128 of K at a time by TMA, which zero-fills outside
// the matrices, into a pipeline of stages. Two consumer warpgroups run the mainloop, with operands in shared memory or,
// upconverted, in registers (w8a16_gemm_sm90a.cu), and the epilogue of a tile while the producer loads the next one's
// stages.
#include "device/gemm_epilogue.cuh"
#include "device/gemm_operands.cuh"
#include "device/pipeline.cuh"
#include "device/ptx_sm90a.cuh"
#include "device/shared_bytes.cuh"
#include "device/tma_map.h"
#include "device/wgmma.cuh"
#include "schedule/tile_map.cuh"

namespace forwardpass {

// ConsumersM: how the two consumer warpgroups divide the tile: 2 by rows, 1 by columns. A tile of fewer than 128 rows
// is computed as its transpose: the 64 rows of a wgmma come from b, and the N of the instruction is all rows of a.
template <class Element_, int M, int N, int ConsumersM, int Stages>
struct WgmmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = M, kN = N, kStages = Stages, kConsumers = 2, kConsumersM = ConsumersM;
  static constexpr int kThreads = 128 * (1 + kConsumers), kWarps = 4 * kConsumers;  // kWarps: of the consumers
  static constexpr bool kTransposed = M < 128;
  static constexpr int kConsumerM = M / ConsumersM, kConsumerN = N * ConsumersM / kConsumers;
  // Of a consumer warpgroup: blocks of 64 rows of the wgmma's a, n8 tiles of its b.
  static constexpr int kWaves = (kTransposed ? kConsumerN : kConsumerM) / 64,
                       kTiles = (kTransposed ? kConsumerM : kConsumerN) / 8;
  static constexpr int kStageK = 128, kSteps = kStageK / 32;  // a row of a stage is one 128-byte swizzle atom
  // At launch each of the 384 threads has 168 registers; setmaxnreg moves them: 128 * 24 + 256 * 240 are as many.
  static constexpr int kProducerRegisters = 24, kConsumerRegisters = 240;
  static constexpr int kBoxes = Element::kSizeB;  // of b in a stage, each as wide as the box of a
  static_assert(!Element::kPromoted || kStageK == kScaleBlock, "promotion is once a stage");

  struct Stage {
    uint8_t a[M][kStageK], b[kBoxes][N][kStageK];
  };
  // The factors by which a stage's accumulators are promoted: one per row of a; for b two, those of gate and up, or of
  // the first and the second 128 columns. TMA writes at multiples of 128 bytes, at least 16 bytes.
  struct Scales {
    alignas(128) float a[M];
    alignas(128) float b[2][32];
  };
  static constexpr int kScaleBytes = sizeof(Scales::a) + 2 * 16;
  struct SharedStorage {
    Stage stage[Stages];
    Scales scales[Element::kPromoted ? Stages : 1];
    Staging staging[kWarps];
    // For this tile and the previous one, by warpgroup: the largest magnitude that each of four lanes found in a row.
    // (An atomic maximum would need one value only, but with it the compiler no longer knows that the main loop's
    // control flow is uniform: 238 instructions instead of 206.)
    float4 largest[2][kConsumers][Element::kPromoted && !kTransposed ? M : 1];
    PipelineBarriers<Stages> barriers;
  };
  static constexpr int kStageUnits = sizeof(Stage) / ptx::kDescriptorUnit;
};

// Where the block scales of b are in the one row that TMA sees: where they begin, the distance from one row of blocks
// to the next, and from the first to the second scale of a stage.
struct BlockOrder {
  int first, row, next;
};

struct WgmmaArguments {
  GemmOutput out;
  TileMap map;     // of clusters; the tiles of a cluster's blocks lie below each other
  uint32_t tiles;  // of clusters, times splits
  int64_t k, split_k;
  bool scaled, gated;  // scaled: with block scales
  BlockOrder order;
  Dtype a_dtype;           // w8a16_gemm: of the weight
  const float* row_scale;  // w8a16_gemm: its 1 x 128 scales, [rows of a, K blocks]; null: none
  CUtensorMap a, b, a_scale, b_scale;
};

// Persistent tile scheduler: the tiles that a block computes one after the other, and the part of K of each.
template <class Config>
struct TileScheduler {
  const WgmmaArguments& p;
  uint32_t cluster, rank, index, clusters;
  int64_t row, column, k;
  int slices, split;

  __device__ explicit TileScheduler(const WgmmaArguments& p)
      : p(p),
        cluster(ptx::cluster_size()),
        rank(ptx::cluster_rank()),
        index(blockIdx.x / cluster),
        clusters(gridDim.x / cluster) {}
  __device__ bool next() {
    if (index >= p.tiles) return false;
    const TileMap::Tile tile = p.map.at(index);
    row = (tile.m * cluster + rank) * Config::kM;
    column = tile.n * Config::kN;
    split = tile.split;
    k = split * p.split_k;
    slices = static_cast<int>((min(p.split_k, p.k - k) + Config::kStageK - 1) / Config::kStageK);
    index += clusters;
    return true;
  }
};

// The producer's main function. A block loads its own rows of a, and its share of the rows of b for all blocks of its
// cluster.
template <class Config>
__device__ inline void producer(const WgmmaArguments& p, typename Config::SharedStorage& s) {
  TileScheduler<Config> scheduler(p);
  const int bytes = sizeof(typename Config::Stage) + (p.scaled ? Config::kScaleBytes : 0);
  const int share = Config::kN / scheduler.cluster;
  const uint16_t all_blocks = (1 << scheduler.cluster) - 1;
  Pipeline<Config::kStages> pipeline(s.barriers);
  while (scheduler.next()) {
    const int row = static_cast<int>(scheduler.row),
              b_row = static_cast<int>(scheduler.column) + scheduler.rank * share,
              first_block = static_cast<int>(scheduler.column) / (p.gated ? 2 * kScaleBlock : kScaleBlock);
    for (int i = 0; i < scheduler.slices; ++i, pipeline.advance()) {
      const int k = static_cast<int>(scheduler.k) + i * Config::kStageK;
      const uint32_t arrived = pipeline.acquire(bytes);
      auto& stage = s.stage[pipeline.stage];
      ptx::tma_load(ptx::shared_address(stage.a), p.a, k, row, arrived);
#pragma unroll
      for (int box = 0; box < Config::kBoxes; ++box) {
        const uint32_t b = ptx::shared_address(stage.b[box][scheduler.rank * share]);
        const int b_k = k + box * (Config::kStageK / Config::kBoxes);
        if (scheduler.cluster == 1) {
          ptx::tma_load(b, p.b, b_k, b_row, arrived);
        } else {
          ptx::tma_load_multicast(b, p.b, b_k, b_row, arrived, all_blocks);
        }
      }
      if (Config::Element::kPromoted && p.scaled) {
        const int block = k / kScaleBlock, b_block = p.order.first + first_block * p.order.row + block;
        auto& scales = s.scales[pipeline.stage];
        ptx::tma_load(ptx::shared_address(scales.a), p.a_scale, row, block, arrived);
        ptx::tma_load(ptx::shared_address(scales.b[0]), p.b_scale, b_block, 0, arrived);
        ptx::tma_load(ptx::shared_address(scales.b[1]), p.b_scale, b_block + p.order.next, 0, arrived);
      }
    }
  }
}

// The factors for a thread's accumulators of a stage: for each pair of rows of a that the thread has, the scale of
// either row times each of the two scales of b.
template <class Config>
struct StageScales {
  static constexpr int kRows = Config::kTransposed ? Config::kTiles : Config::kWaves;
  float scale[kRows][2][2];
  __device__ float of(int wave, int tile, int element) const {
    return Config::kTransposed ? scale[tile][element % 2][element / 2] : scale[wave][element / 2][tile % 2];
  }
};

// A consumer's side of the pipeline, and its warps' positions in the tile.
template <class Config>
struct ConsumerBase {
  Pipeline<Config::kStages> pipeline;
  int row, column;  // first of this warp in the tile
  // Empty barrier of the cluster's block whose rank is this lane, or 0: its producer fills this block's stages too.
  uint32_t empty;

  __device__ static int a_row(int warpgroup) { return warpgroup % Config::kConsumersM * Config::kConsumerM; }
  __device__ static int b_row(int warpgroup) { return warpgroup / Config::kConsumersM * Config::kConsumerN; }
  __device__ ConsumerBase(typename Config::SharedStorage& s, int warpgroup) : pipeline(s.barriers) {
    const uint32_t lane = threadIdx.x % 32;
    const int rows = threadIdx.x / 32 % 4 * 16;
    row = a_row(warpgroup) + (Config::kTransposed ? 0 : rows),
    column = b_row(warpgroup) + (Config::kTransposed ? rows : 0);
    const uint32_t there = ptx::map_shared(ptx::shared_address(s.barriers.empty), min(lane, ptx::cluster_size() - 1));
    empty = uniform(lane < ptx::cluster_size() ? there : 0, lane);
  }
  __device__ void release(int stage) {
    if (empty) ptx::mbarrier_arrive_cluster(empty + stage * 8);
  }
};

// The consumer of a kernel whose operands are both in shared memory.
template <class Config>
struct Consumer : ConsumerBase<Config> {
  using ConsumerBase<Config>::pipeline, ConsumerBase<Config>::row, ConsumerBase<Config>::column;
  using Acc = typename Config::Acc;
  using Accumulators = Acc[Config::kTiles][4];
  uint32_t a, b;  // low halves of the wgmma descriptors of both operands in the first stage
  // In the first stage: scales of a from this thread's first row on; of b for even and for odd n8 tiles or, if
  // transposed, for row lane / 4 and the row eight below.
  uint32_t a_scale, b_scale[2];

  __device__ Consumer(typename Config::SharedStorage& s, int warpgroup, bool gated)
      : ConsumerBase<Config>(s, warpgroup) {
    const uint32_t lane = threadIdx.x % 32;
    const uint8_t *rows_a = s.stage[0].a[ConsumerBase<Config>::a_row(warpgroup)],
                  *rows_b = s.stage[0].b[0][ConsumerBase<Config>::b_row(warpgroup)];
    a = uniform(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_b : rows_a)));
    b = uniform(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_a : rows_b)));
    a_scale = uniform(ptx::shared_address(&s.scales[0].a[row + (Config::kTransposed ? lane % 4 * 2 : lane / 4)]), lane);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      b_scale[i] = uniform(ptx::shared_address(s.scales[0].b[gated ? i : column / kScaleBlock]));
  }
  // One group of wgmmas: 64 rows of the wgmma's a by the 128 of K of this stage.
  __device__ void mma(Accumulators& acc, int wave, bool accumulate) {
    const uint32_t at = pipeline.stage * Config::kStageUnits;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint32_t k = step * 32 / ptx::kDescriptorUnit;
      ptx::wgmma_k32(acc, a + at + k + wave * 64 * Config::kStageK / ptx::kDescriptorUnit, b + at + k,
                     accumulate || step > 0);
    }
  }
  __device__ void load_scales(StageScales<Config>& scales) const {
    const uint32_t at = pipeline.stage * sizeof(typename Config::Scales);
    const float b[2] = {ptx::load_shared(b_scale[0] + at), ptx::load_shared(b_scale[1] + at)};
#pragma unroll
    for (int i = 0; i < StageScales<Config>::kRows; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const int row = Config::kTransposed ? i * 8 + j : i * 64 + j * 8;
        const float a = ptx::load_shared(a_scale + at + row * sizeof(float));
        scales.scale[i][j][0] = a * b[0], scales.scale[i][j][1] = a * b[1];
      }
  }
};

// The mainloop with exact accumulators: the wgmmas of a stage run while the next ones are issued, and the stage is
// released when they have completed.
template <class Config>
__device__ inline void mainloop(Consumer<Config>& m, const TileScheduler<Config>& scheduler,
                                typename Config::Acc (&acc)[Config::kWaves][Config::kTiles][4]) {
  static_assert(Config::kWaves == 1);
  int before = m.pipeline.stage;
  m.pipeline.wait_full();
  ptx::wgmma_fence();
  m.mma(acc[0], 0, false);
  ptx::wgmma_commit();
  m.pipeline.advance();
#pragma unroll 1
  for (int i = 1; i < scheduler.slices; ++i) {
    m.pipeline.wait_full();
    ptx::wgmma_fence();
    m.mma(acc[0], 0, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    m.release(before);
    before = m.pipeline.stage;
    m.pipeline.advance();
  }
  ptx::wgmma_wait<0>();
  m.release(before);
}

// The mainloop with promotion: after each stage the partial accumulators, times the stage's scales, are added to the
// fp32 ones. Registers allow partial accumulators of 64 rows only; while one warpgroup promotes them, the other's
// wgmmas run.
template <class Config>
__device__ inline void mainloop(Consumer<Config>& m, const TileScheduler<Config>& scheduler,
                                float (&acc)[Config::kWaves][Config::kTiles][4]) {
#pragma unroll
  for (int w = 0; w < Config::kWaves; ++w)
#pragma unroll
    for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[w][j][e] = 0;
#pragma unroll 1
  for (int i = 0; i < scheduler.slices; ++i) {
    m.pipeline.wait_full();
    StageScales<Config> scales;
    m.load_scales(scales);
#pragma unroll
    for (int w = 0; w < Config::kWaves; ++w) {
      float partial[Config::kTiles][4];
      ptx::wgmma_fence();
      m.mma(partial, w, false);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (w == Config::kWaves - 1) {
        m.release(m.pipeline.stage);
        m.pipeline.advance();
      }
#pragma unroll
      for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[w][j][e] = fmaf(partial[j][e], scales.of(w, j, e), acc[w][j][e]);
    }
  }
}

// Quantises a tile's outputs to e4m3 with one scale for each row's group of 128, all of whose columns are in this tile.
// Two passes through the epilogue: the first finds the largest magnitude, the second stores the values.
template <class Config>
struct GroupQuantizer {
  static constexpr int kBarrier = 1;  // a named barrier of the consumers; 0 is __syncthreads
  typename Config::SharedStorage& s;
  const GemmOutput& o;
  const Consumer<Config>& m;
  int first_row;        // of the tile
  int tile, warpgroup;  // tile: how many came before; a slower warp may still read the other half of s.largest

  __device__ float4& largest(int g, int64_t row) const {
    return s.largest[tile % 2][g][static_cast<int>(row) - first_row];
  }
  // If gated, the outputs of both warpgroups make one group.
  __device__ bool shared() const { return Config::kConsumersM == 1 && is_gated(o.epilogue.activation); }

  __device__ void begin() const {
    for (int i = threadIdx.x % 32; i < Config::kWaves * 16; i += 32)
      largest(warpgroup, first_row + m.row + i / 16 * 64 + i % 16) = make_float4(0, 0, 0, 0);
    __syncwarp();
  }
  __device__ void measure(const float (&y)[kVec], int64_t row, int n) const {
    float& most =
        reinterpret_cast<float*>(&largest(warpgroup, row))[threadIdx.x % 4];  // at most four lanes share a row
    float v = most;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < n) v = ptx::max_nan(v, fabsf(y[i]));
    most = v;
  }
  __device__ void exchange() const {
    if (shared()) {
      ptx::barrier_sync(kBarrier, 128 * Config::kConsumers);
    } else {
      __syncwarp();
    }
  }
  __device__ void store(const float (&y)[kVec], int64_t row, int64_t column, int n) const {
    const auto all = [](float4 v) { return ptx::max_nan(ptx::max_nan(v.x, v.y), ptx::max_nan(v.z, v.w)); };
    float range = all(largest(warpgroup, row));
    if (shared()) range = ptx::max_nan(range, all(largest(1 - warpgroup, row)));
    range = range < kLeastRange ? kLeastRange : range;
    const float inverse = __fdiv_rn(448.0f, range);
    if (column % kScaleBlock == 0)
      o.epilogue.group_scale[row + column / kScaleBlock * o.epilogue.group_scale_stride] = __fdiv_rn(range, 448.0f);
    store_vec(to_e4m3_vector(y, inverse), static_cast<uint8_t*>(o.epilogue.out) + row * o.epilogue.out_stride + column,
              n, o.access.out);
  }
};

// The epilogue of a tile. Its code exists once: the loop runs twice if outputs are quantised.
template <class Config>
__device__ inline void store_tile(const Consumer<Config>& m, const TileScheduler<Config>& scheduler,
                                  const typename Config::Acc (&acc)[Config::kWaves][Config::kTiles][4],
                                  typename Config::SharedStorage& s, const GemmOutput& o, int tile, int warpgroup) {
  Staging& staging = s.staging[threadIdx.x / 32];
  if constexpr (Config::kTransposed) {
    finish_transposed(acc, staging, o, scheduler.row + m.row, scheduler.column + m.column, scheduler.split);
    return;
  }
  const bool quantized = Config::Element::kPromoted && o.epilogue.group_scale;
  const GroupQuantizer<Config> groups{s, o, m, static_cast<int>(scheduler.row), tile, warpgroup};
  if (quantized) groups.begin();
#pragma unroll 1
  for (int pass = quantized ? 0 : 1; pass < 2; ++pass) {
    const auto store = [&](float (&y)[kVec], int64_t row, int64_t column, int n) {
      if (!quantized) {
        store_output(y, o.epilogue, o.access, row, column, n);
      } else if (pass == 0) {
        groups.measure(y, row, n);
      } else {
        groups.store(y, row, column, n);
      }
    };
    for_each_staged<64>(acc, staging, scheduler.row + m.row, scheduler.column + m.column,
                        [&](auto columns, int64_t row, int64_t column) {
                          finish_staged<decltype(columns)::value, typename Config::Acc>(staging, o, row, column,
                                                                                        scheduler.split, store);
                        });
    if (quantized && pass == 0) groups.exchange();
  }
}

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, 1) gemm_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(p.a);
    ptx::prefetch_tensor_map(p.b);
    s.barriers.init(Config::kWarps * ptx::cluster_size());
    ptx::fence_mbarrier_init();
  }
  if (Config::Element::kPromoted && !p.scaled) {
    auto one = reinterpret_cast<float*>(s.scales);
    for (unsigned i = threadIdx.x; i < sizeof(s.scales) / sizeof(float); i += Config::kThreads) one[i] = 1;
  }
  __syncwarp();
  ptx::cluster_sync();

  const int warpgroup = uniform(threadIdx.x / 128);
  if (warpgroup == Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == Config::kConsumers * 128) producer<Config>(p, s);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    TileScheduler<Config> scheduler(p);
    Consumer<Config> m(s, warpgroup, p.gated);
    int tile = 0;
    while (scheduler.next()) {
      typename Config::Acc acc[Config::kWaves][Config::kTiles][4];
      mainloop(m, scheduler, acc);
      store_tile(m, scheduler, acc, s, p.out, tile++, warpgroup);
    }
  }
  ptx::cluster_sync();  // other blocks of the cluster may still arrive at this block's barriers
}

template <class Config>
cudaError_t launch_gemm_wgmma(const GemmParams& p, cudaStream_t stream) {
  using Element = typename Config::Element;
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int cluster = p.choice.cluster;
  const Matrix &a = Element::kSwapAB ? p.b : p.a, &b = Element::kSwapAB ? p.a : p.b;
  const TileMap map(ceil_div(ceil_div(a.rows, Config::kM), cluster), ceil_div(b.rows, Config::kN));
  const bool scaled = p.blocks.a, gated = is_gated(p.epilogue.activation);
  WgmmaArguments arguments{GemmOutput(p),
                           map,
                           map.blocks(p.choice.splits),
                           a.columns,
                           p.choice.split_k,
                           scaled,
                           gated,
                           {},
                           a.dtype,
                           scaled ? nullptr : p.blocks.b,
                           {},
                           {},
                           {},
                           {}};
  const auto operand = [](CUtensorMap& to, const Matrix& m, int box_rows) {
    const int64_t size = size_of(m.dtype);
    return encode_boxes(to, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, m.data, m.rows,
                        m.columns, m.stride * size, box_rows, Config::kStageK / size, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (auto e = operand(arguments.a, a, Config::kM)) return e;
  if (auto e = operand(arguments.b, b, Config::kN / cluster)) return e;
  if (scaled) {
    const int64_t depth = ceil_div(p.a.columns, kScaleBlock), next = gated ? p.blocks.up_offset : depth,
                  count = gated ? 2 * next : depth * ceil_div(p.b.rows, kScaleBlock);
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
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = std::min<unsigned>(p.choice.blocks / cluster, arguments.tiles) * cluster;
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (auto e = cudaLaunchKernelEx(&config, kernel, arguments)) return e;
  return reduce_split_k(p, Element::kAcc, stream);
}

}  // namespace forwardpass
