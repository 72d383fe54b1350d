#pragma once
// GEMM on wgmma: int8, e4m3 and 8-bit weights by 16-bit x on sm_90a. A block makes tile after tile of the product. One
// thread loads: 128 of K at a time come by TMA, which fills with zeros beyond the matrices, into a ring of stages. Two
// warpgroups multiply, straight from shared memory or what they have widened (w8a16_gemm_sm90a.cu), and finish their
// tile while the next one's stages are loaded.
#include "device/gemm_epilogue.cuh"
#include "device/gemm_operands.cuh"
#include "device/ptx_sm90a.cuh"
#include "device/ring.cuh"
#include "device/shared_bytes.cuh"
#include "device/tma_map.h"
#include "device/wgmma.cuh"
#include "schedule/tile_map.cuh"

namespace forwardpass {

// GroupsM: how the two multiplying warpgroups divide the tile, 2: its rows, 1: its columns. A tile of fewer than 64 * 2
// rows is made transposed: the 64 rows of a wgmma are of b, the N of its instruction are all rows of a.
template <class Element_, int M, int N, int GroupsM, int Stages>
struct WgmmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = M, kN = N, kStages = Stages, kGroups = 2, kGroupsM = GroupsM;
  static constexpr int kThreads = 128 * (1 + kGroups), kWarps = 4 * kGroups;  // kWarps: those that multiply
  static constexpr bool kTransposed = M < 128;
  static constexpr int kGroupM = M / GroupsM, kGroupN = N * GroupsM / kGroups;
  // Of a warpgroup: 64 rows of wgmma's a, n8 tiles of its b.
  static constexpr int kWaves = (kTransposed ? kGroupN : kGroupM) / 64, kTiles = (kTransposed ? kGroupM : kGroupN) / 8;
  static constexpr int kStageK = 128, kSteps = kStageK / 32;  // a stage's rows are one swizzle of 128 bytes
  // 384 threads get 168 registers each at launch; 128 * 24 + 256 * 240 are as many.
  static constexpr int kLoadRegisters = 24, kMultiplyRegisters = 240;
  static constexpr int kBoxes = Element::kSizeB;  // those of b are as wide
  static_assert(!Element::kPromoted || kStageK == kScaleBlock, "promotion is once a stage");

  struct Stage {
    uint8_t a[M][kStageK], b[kBoxes][N][kStageK];
  };
  // What a stage's sums are multiplied by as they are promoted: of the rows of a; of b two, those of gate and of up, or
  // else of the first and the second 128 columns. TMA writes to multiples of 128 bytes, 16 bytes at least.
  struct Scales {
    alignas(128) float a[M];
    alignas(128) float b[2][32];
  };
  static constexpr int kScaleBytes = sizeof(Scales::a) + 2 * 16;
  struct SharedStorage {
    Stage stage[Stages];
    Scales scales[Element::kPromoted ? Stages : 1];
    Slab slab[kWarps];
    // Of this tile and of the one before, by warpgroup: the largest magnitudes that each lane found in a row. (An
    // atomic maximum would be one value, but with it the main loop's control flow is no longer known to be uniform: 238
    // instructions in place of 206.)
    float4 largest[2][kGroups][Element::kPromoted && !kTransposed ? M : 1];
    StageBarriers<Stages> barriers;
  };
  static constexpr int kStageUnits = sizeof(Stage) / ptx::kDescriptorUnit;
};

// Scales of blocks of b, all in one row for TMA: where they begin in it, from row block to row block, and from the
// first to the second of a stage.
struct BlockOrder {
  int first, row, next;
};

struct WgmmaArguments {
  GemmOutput out;
  TileMap map;     // of clusters' tiles: those of its blocks lie below each other
  uint32_t tiles;  // clusters' tiles times splits
  int64_t k, split_k;
  bool scaled, gated;  // scaled: there are scales of blocks
  BlockOrder order;
  Dtype a_dtype;           // of the weight in w8a16_gemm
  const float* row_scale;  // and its scales of 1 x 128, [rows of a, K blocks]; null: none
  CUtensorMap a, b, a_scale, b_scale;
};

// The tiles that a block makes, and their depth.
template <class Config>
struct Work {
  const WgmmaArguments& p;
  uint32_t cluster, rank, index, clusters;
  int64_t row, column, k;
  int slices, split;

  __device__ explicit Work(const WgmmaArguments& p)
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

// A block loads its own rows of a and its share of the rows of b for all blocks of its cluster.
template <class Config>
__device__ inline void load(const WgmmaArguments& p, typename Config::SharedStorage& s) {
  Work<Config> work(p);
  const int bytes = sizeof(typename Config::Stage) + (p.scaled ? Config::kScaleBytes : 0);
  const int share = Config::kN / work.cluster;
  const uint16_t everyone = (1 << work.cluster) - 1;
  forwardpass::Stage<Config::kStages> ring(s.barriers);
  while (work.next()) {
    const int row = static_cast<int>(work.row), b_row = static_cast<int>(work.column) + work.rank * share,
              first_block = static_cast<int>(work.column) / (p.gated ? 2 * kScaleBlock : kScaleBlock);
    for (int i = 0; i < work.slices; ++i, ring.advance()) {
      const int k = static_cast<int>(work.k) + i * Config::kStageK;
      const uint32_t arrived = ring.fill(bytes);
      auto& stage = s.stage[ring.stage];
      ptx::tma_load(ptx::shared_address(stage.a), p.a, k, row, arrived);
#pragma unroll
      for (int box = 0; box < Config::kBoxes; ++box) {
        const uint32_t b = ptx::shared_address(stage.b[box][work.rank * share]);
        const int b_k = k + box * (Config::kStageK / Config::kBoxes);
        if (work.cluster == 1) {
          ptx::tma_load(b, p.b, b_k, b_row, arrived);
        } else {
          ptx::tma_load_multicast(b, p.b, b_k, b_row, arrived, everyone);
        }
      }
      if (Config::Element::kPromoted && p.scaled) {
        const int block = k / kScaleBlock, b_block = p.order.first + first_block * p.order.row + block;
        auto& scales = s.scales[ring.stage];
        ptx::tma_load(ptx::shared_address(scales.a), p.a_scale, row, block, arrived);
        ptx::tma_load(ptx::shared_address(scales.b[0]), p.b_scale, b_block, 0, arrived);
        ptx::tma_load(ptx::shared_address(scales.b[1]), p.b_scale, b_block + p.order.next, 0, arrived);
      }
    }
  }
}

// What a thread multiplies a stage's sums by: for each pair of rows of a that it has, the scales of either times those
// of b.
template <class Config>
struct StageScales {
  static constexpr int kRows = Config::kTransposed ? Config::kTiles : Config::kWaves;
  float scale[kRows][2][2];
  __device__ float of(int wave, int tile, int element) const {
    return Config::kTransposed ? scale[tile][element % 2][element / 2] : scale[wave][element / 2][tile % 2];
  }
};

// A warpgroup's side of the ring, and where its warps are.
template <class Config>
struct Consumer {
  forwardpass::Stage<Config::kStages> ring;
  int row, column;  // of this warp in the tile
  uint32_t empty;  // that of the block of the cluster whose rank is this lane, or zero: their loads fill this block too

  __device__ static int a_row(int group) { return group % Config::kGroupsM * Config::kGroupM; }
  __device__ static int b_row(int group) { return group / Config::kGroupsM * Config::kGroupN; }
  __device__ Consumer(typename Config::SharedStorage& s, int group) : ring(s.barriers) {
    const uint32_t lane = threadIdx.x % 32;
    const int rows = threadIdx.x / 32 % 4 * 16;
    row = a_row(group) + (Config::kTransposed ? 0 : rows), column = b_row(group) + (Config::kTransposed ? rows : 0);
    const uint32_t there = ptx::map_shared(ptx::shared_address(s.barriers.empty), min(lane, ptx::cluster_size() - 1));
    empty = kept(lane < ptx::cluster_size() ? there : 0, lane);
  }
  __device__ void release(int stage) {
    if (empty) ptx::mbarrier_arrive_cluster(empty + stage * 8);
  }
};

// And what it multiplies.
template <class Config>
struct Multiplier : Consumer<Config> {
  using Consumer<Config>::ring, Consumer<Config>::row, Consumer<Config>::column;
  using Acc = typename Config::Acc;
  using Sums = Acc[Config::kTiles][4];
  uint32_t a, b;  // low halves of the descriptors of wgmma's operands in the first stage
  // In the first stage: those of a from this thread's first row on; of even and of odd n8 tiles or, transposed, rows
  // lane / 4 and eight below.
  uint32_t a_scale, b_scale[2];

  __device__ Multiplier(typename Config::SharedStorage& s, int group, bool gated) : Consumer<Config>(s, group) {
    const uint32_t lane = threadIdx.x % 32;
    const uint8_t *rows_a = s.stage[0].a[Consumer<Config>::a_row(group)],
                  *rows_b = s.stage[0].b[0][Consumer<Config>::b_row(group)];
    a = kept(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_b : rows_a)));
    b = kept(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_a : rows_b)));
    a_scale = kept(ptx::shared_address(&s.scales[0].a[row + (Config::kTransposed ? lane % 4 * 2 : lane / 4)]), lane);
#pragma unroll
    for (int i = 0; i < 2; ++i) b_scale[i] = kept(ptx::shared_address(s.scales[0].b[gated ? i : column / kScaleBlock]));
  }
  // One group of wgmmas: 64 rows of wgmma's a by 128 of K of this stage.
  __device__ void multiply(Sums& sums, int wave, bool accumulate) {
    const uint32_t at = ring.stage * Config::kStageUnits;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint32_t k = step * 32 / ptx::kDescriptorUnit;
      ptx::wgmma_k32(sums, a + at + k + wave * 64 * Config::kStageK / ptx::kDescriptorUnit, b + at + k,
                     accumulate || step > 0);
    }
  }
  __device__ void load_scales(StageScales<Config>& scales) const {
    const uint32_t at = ring.stage * sizeof(typename Config::Scales);
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

// Exact sums: a stage's wgmmas run while the next ones are issued, and it is released when they have ended.
template <class Config>
__device__ inline void multiply_tile(Multiplier<Config>& m, const Work<Config>& work,
                                     typename Config::Acc (&sum)[Config::kWaves][Config::kTiles][4]) {
  static_assert(Config::kWaves == 1);
  int before = m.ring.stage;
  m.ring.wait();
  ptx::wgmma_fence();
  m.multiply(sum[0], 0, false);
  ptx::wgmma_commit();
  m.ring.advance();
#pragma unroll 1
  for (int i = 1; i < work.slices; ++i) {
    m.ring.wait();
    ptx::wgmma_fence();
    m.multiply(sum[0], 0, true);
    ptx::wgmma_commit();
    ptx::wgmma_wait<1>();
    m.release(before);
    before = m.ring.stage;
    m.ring.advance();
  }
  ptx::wgmma_wait<0>();
  m.release(before);
}

// Sums that are promoted after each stage, times its scales. There are registers for the partial sums of 64 rows only:
// while one warpgroup adds them the other one's wgmmas run.
template <class Config>
__device__ inline void multiply_tile(Multiplier<Config>& m, const Work<Config>& work,
                                     float (&sum)[Config::kWaves][Config::kTiles][4]) {
#pragma unroll
  for (int w = 0; w < Config::kWaves; ++w)
#pragma unroll
    for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[w][j][e] = 0;
#pragma unroll 1
  for (int i = 0; i < work.slices; ++i) {
    m.ring.wait();
    StageScales<Config> scales;
    m.load_scales(scales);
#pragma unroll
    for (int w = 0; w < Config::kWaves; ++w) {
      float part[Config::kTiles][4];
      ptx::wgmma_fence();
      m.multiply(part, w, false);
      ptx::wgmma_commit();
      ptx::wgmma_wait<0>();
      if (w == Config::kWaves - 1) {
        m.release(m.ring.stage);
        m.ring.advance();
      }
#pragma unroll
      for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sum[w][j][e] = fmaf(part[j][e], scales.of(w, j, e), sum[w][j][e]);
    }
  }
}

// The tile's outputs as e4m3 with a scale for each row's group of 128, all of it in this tile: once through the
// epilogue for the largest magnitude, once for the values.
template <class Config>
struct GroupQuantizer {
  typename Config::SharedStorage& s;
  const GemmOutput& o;
  const Multiplier<Config>& m;
  int first_row;    // of the tile
  int tile, group;  // tiles so far: the other half of s.largest may still be read; group: this warpgroup

  __device__ float4& largest(int g, int64_t row) const {
    return s.largest[tile % 2][g][static_cast<int>(row) - first_row];
  }
  // gated, the group is that of both warpgroups
  __device__ bool shared() const { return Config::kGroupsM == 1 && is_gated(o.epilogue.activation); }

  __device__ void begin() const {
    for (int i = threadIdx.x % 32; i < Config::kWaves * 16; i += 32)
      largest(group, first_row + m.row + i / 16 * 64 + i % 16) = make_float4(0, 0, 0, 0);
    __syncwarp();
  }
  __device__ void measure(const float (&y)[kVec], int64_t row, int n) const {
    float& most = reinterpret_cast<float*>(&largest(group, row))[threadIdx.x % 4];  // four lanes at most share a row
    float v = most;
#pragma unroll
    for (int i = 0; i < kVec; ++i)
      if (i < n) v = ptx::max_nan(v, fabsf(y[i]));
    most = v;
  }
  __device__ void exchange() const {
    if (shared()) {
      ptx::barrier_sync(1, 128 * Config::kGroups);
    } else {
      __syncwarp();
    }
  }
  __device__ void store(const float (&y)[kVec], int64_t row, int64_t column, int n) const {
    const auto all = [](float4 v) { return ptx::max_nan(ptx::max_nan(v.x, v.y), ptx::max_nan(v.z, v.w)); };
    float range = all(largest(group, row));
    if (shared()) range = ptx::max_nan(range, all(largest(1 - group, row)));
    range = range < kLeastRange ? kLeastRange : range;
    const float inverse = __fdiv_rn(448.0f, range);
    if (column % kScaleBlock == 0)
      o.epilogue.group_scale[row + column / kScaleBlock * o.epilogue.group_scale_stride] = __fdiv_rn(range, 448.0f);
    store_vec(to_e4m3_vector(y, inverse), static_cast<uint8_t*>(o.epilogue.out) + row * o.epilogue.out_stride + column,
              n, o.access.out);
  }
};

// The epilogue, whose code is there once: the loop goes round twice where outputs are quantised.
template <class Config>
__device__ inline void finish_tile(const Multiplier<Config>& m, const Work<Config>& work,
                                   const typename Config::Acc (&sum)[Config::kWaves][Config::kTiles][4],
                                   typename Config::SharedStorage& s, const GemmOutput& o, int tile, int group) {
  Slab& slab = s.slab[threadIdx.x / 32];
  if constexpr (Config::kTransposed) {
    finish_transposed(sum, slab, o, work.row + m.row, work.column + m.column, work.split);
    return;
  }
  const bool quantized = Config::Element::kPromoted && o.epilogue.group_scale;
  const GroupQuantizer<Config> groups{s, o, m, static_cast<int>(work.row), tile, group};
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
    each_slab<64>(sum, slab, work.row + m.row, work.column + m.column, [&](auto columns, int64_t row, int64_t column) {
      finish_slab<decltype(columns)::value, typename Config::Acc>(slab, o, row, column, work.split, store);
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

  const int warpgroup = kept(threadIdx.x / 128);
  if (warpgroup == Config::kGroups) {
    ptx::setmaxnreg_dec<Config::kLoadRegisters>();
    if (threadIdx.x == Config::kGroups * 128) load<Config>(p, s);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<Config::kMultiplyRegisters>();
    Work<Config> work(p);
    Multiplier<Config> m(s, warpgroup, p.gated);
    int tile = 0;
    while (work.next()) {
      typename Config::Acc sum[Config::kWaves][Config::kTiles][4];
      multiply_tile(m, work, sum);
      finish_tile(m, work, sum, s, p.out, tile++, warpgroup);
    }
  }
  ptx::cluster_sync();  // until then other blocks of the cluster arrive at barriers of this one
}

template <class Config>
cudaError_t launch_gemm_wgmma(const GemmParams& p, cudaStream_t stream) {
  using Element = typename Config::Element;
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int cluster = p.choice.cluster;
  const Matrix &a = Element::kExchanged ? p.b : p.a, &b = Element::kExchanged ? p.a : p.b;
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
    // The row begins at a multiple of 16 bytes, the scales perhaps behind that.
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
  return finish_splits(p, Element::kAcc, stream);
}

}  // namespace forwardpass
