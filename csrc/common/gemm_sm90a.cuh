#pragma once
// GEMM on wgmma: int8 and e4m3 on sm_90a. A block makes tile after tile of the product. One thread loads: 128 of K at a
// time come by TMA, which fills with zeros beyond the matrices, into a ring of stages. Two warpgroups multiply, straight
// from shared memory, and finish their tile while the next one's stages are loaded.
#include "common/gemm_epilogue.cuh"
#include "common/gemm_tiles.cuh"
#include "common/ptx_sm90a.cuh"
#include "common/shared_bytes.cuh"
#include "common/tma_map.h"
#include "common/wgmma.cuh"

namespace forwardpass {

// GroupsM: how the two multiplying warpgroups divide the tile, 2: its rows, 1: its columns.
template <class Element_, int M, int N, int GroupsM, int Stages>
struct WgmmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = M, kN = N, kStages = Stages, kGroups = 2, kGroupsM = GroupsM;
  static constexpr int kThreads = 128 * (1 + kGroups), kWarps = 4 * kGroups;  // kWarps: those that multiply
  static constexpr int kGroupM = M / GroupsM, kGroupN = N * GroupsM / kGroups;
  static constexpr int kWaves = kGroupM / 64, kTiles = kGroupN / 8;  // of a warpgroup: blocks of 64 rows, n8 tiles
  static constexpr int kStageK = 128, kSteps = kStageK / 32;         // a stage's rows are one swizzle of 128 bytes
  // 384 threads get 168 registers each at launch; 128 * 40 + 256 * 232 are as many.
  static constexpr int kLoadRegisters = 40, kMultiplyRegisters = 232;
  static_assert(!Element::kPromoted || kStageK == kScaleBlock, "promotion is once a stage");

  struct Stage {
    uint8_t a[M][kStageK], b[N][kStageK];
  };
  struct SharedStorage {
    Stage stage[Stages];
    alignas(128) float a_scale[Stages][Element::kPromoted ? M : 32];  // of a row's 128 of K
    Slab slab[kWarps];
    uint64_t full[Stages], empty[Stages];
  };
  static constexpr int kStageUnits = sizeof(Stage) / ptx::kDescriptorUnit;
};

struct WgmmaArguments {
  CUtensorMap a, b, a_scale;
  BlockScales blocks;
  TileMap map;    // of clusters' tiles: those of its blocks lie below each other
  int64_t tiles;  // clusters' tiles times splits
  int64_t k, split_k;
  GemmOutput out;
};

// Where one side is in the ring of stages.
template <int Stages>
struct Ring {
  int stage = 0;
  uint32_t parity = 0;
  __device__ void advance() {
    if (++stage == Stages) stage = 0, parity ^= 1;
  }
};

// The tiles that a block makes, and their depth.
template <class Config>
struct Work {
  const WgmmaArguments& p;
  uint32_t cluster, rank;
  int64_t index, clusters;
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
  const uint32_t full = ptx::shared_address(s.full), empty = ptx::shared_address(s.empty);
  const bool scaled = p.blocks.b;
  const int bytes = sizeof(typename Config::Stage) + (scaled ? sizeof(s.a_scale[0]) : 0);
  const int share = Config::kN / work.cluster;
  const uint16_t everyone = (1 << work.cluster) - 1;
  Ring<Config::kStages> ring;
  while (work.next()) {
    const int row = static_cast<int>(work.row), b_row = static_cast<int>(work.column) + work.rank * share;
    for (int i = 0; i < work.slices; ++i, ring.advance()) {
      const int k = static_cast<int>(work.k) + i * Config::kStageK;
      const uint32_t arrived = full + ring.stage * 8;
      auto& stage = s.stage[ring.stage];
      while (!ptx::mbarrier_try_wait(empty + ring.stage * 8, ring.parity ^ 1)) {
      }
      ptx::mbarrier_arrive_expect_tx(arrived, bytes);
      ptx::tma_load(ptx::shared_address(stage.a), p.a, k, row, arrived);
      const uint32_t b = ptx::shared_address(stage.b[work.rank * share]);
      if (work.cluster == 1) {
        ptx::tma_load(b, p.b, k, b_row, arrived);
      } else {
        ptx::tma_load_multicast(b, p.b, k, b_row, arrived, everyone);
      }
      if (scaled)
        ptx::tma_load(ptx::shared_address(s.a_scale[ring.stage]), p.a_scale, row, k / kScaleBlock, arrived);
    }
  }
}

// A warpgroup's side of the ring, and what it multiplies.
template <class Config>
struct Multiplier {
  using Acc = typename Config::Acc;
  using Sums = Acc[Config::kTiles][4];
  Ring<Config::kStages> ring;
  uint32_t full, empty;  // empty: that of the block of the cluster whose rank is this lane
  uint32_t a, b;         // low halves of the descriptors in the first stage
  bool releases;         // a lane of every warp for each block of the cluster, as their loads fill this block too
  int row, column;       // of this warp in the tile
  const float* a_scale;  // of this thread's first row in the first stage

  __device__ Multiplier(typename Config::SharedStorage& s, int group) {
    const uint32_t lane = threadIdx.x % 32;
    row = group % Config::kGroupsM * Config::kGroupM + threadIdx.x / 32 % 4 * 16;
    column = group / Config::kGroupsM * Config::kGroupN;
    a_scale = &s.a_scale[0][row + lane / 4];
    full = ptx::shared_address(s.full);
    releases = lane < ptx::cluster_size();
    empty = ptx::map_shared(ptx::shared_address(s.empty), releases ? lane : 0);
    a = ptx::descriptor(ptx::shared_address(s.stage[0].a[group % Config::kGroupsM * Config::kGroupM]));
    b = ptx::descriptor(ptx::shared_address(s.stage[0].b[group / Config::kGroupsM * Config::kGroupN]));
  }
  __device__ void wait() {
    while (!ptx::mbarrier_try_wait(full + ring.stage * 8, ring.parity)) {
    }
  }
  // One group of wgmmas: 64 rows by 128 of K of this stage.
  __device__ void multiply(Sums& sums, int wave, bool accumulate) {
    const uint32_t at = ring.stage * Config::kStageUnits;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint32_t k = step * 32 / ptx::kDescriptorUnit;
      ptx::wgmma_k32(sums, a + at + k + wave * 64 * Config::kStageK / ptx::kDescriptorUnit, b + at + k,
                     accumulate || step > 0);
    }
  }
  __device__ void release(int stage) {
    if (releases) ptx::mbarrier_arrive_cluster(empty + stage * 8);
  }
};

// Exact sums: a stage's wgmmas run while the next ones are issued, and it is released when they have ended.
template <class Config>
__device__ inline void multiply_tile(Multiplier<Config>& m, const Work<Config>& work,
                                     typename Config::Acc (&sum)[Config::kWaves][Config::kTiles][4]) {
  static_assert(Config::kWaves == 1);
  int before = m.ring.stage;
  m.wait();
  ptx::wgmma_fence();
  m.multiply(sum[0], 0, false);
  ptx::wgmma_commit();
  m.ring.advance();
#pragma unroll 1
  for (int i = 1; i < work.slices; ++i) {
    m.wait();
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

// The scales of a warpgroup's columns, all in one block of 128 (gated: those of gate and of up), for 128 of K after
// another; each is fetched one ahead.
struct ColumnScales {
  const float* from;
  int64_t up_offset;
  int left;
  float gate, up;

  __device__ ColumnScales(const WgmmaArguments& p, int64_t column, int64_t k, int slices)
      : up_offset(p.blocks.up_offset), left(slices) {
    const bool gated = is_gated(p.out.epilogue.activation);
    const int64_t inside = min(column, p.out.columns - 1), depth = (p.k + kScaleBlock - 1) / kScaleBlock;
    from = p.blocks.b + (gated ? inside / 2 : inside) / kScaleBlock * depth + k / kScaleBlock;
    if (p.blocks.b) fetch();
  }
  __device__ void fetch() { gate = from[0], up = from[up_offset]; }
  __device__ void advance() {
    if (--left > 0) ++from, fetch();
  }
};

// Sums that are promoted after each stage, times its scales. There are registers for the partial sums of 64 rows only:
// while one warpgroup adds them the other one's wgmmas run.
template <class Config>
__device__ inline void multiply_tile(Multiplier<Config>& m, const Work<Config>& work,
                                     float (&sum)[Config::kWaves][Config::kTiles][4]) {
  float scale[Config::kWaves][2][2];  // of the rows lane / 4 and eight below, times those of gate and of up
#pragma unroll
  for (int w = 0; w < Config::kWaves; ++w) {
#pragma unroll
    for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[w][j][e] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) scale[w][i / 2][i % 2] = 1;
  }
  const bool scaled = work.p.blocks.b;
  ColumnScales scales(work.p, work.column + m.column, work.k, work.slices);
#pragma unroll 1
  for (int i = 0; i < work.slices; ++i) {
    m.wait();
    if (scaled) {
#pragma unroll
      for (int w = 0; w < Config::kWaves; ++w)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float a = m.a_scale[m.ring.stage * Config::kM + w * 64 + half * 8];
          scale[w][half][0] = a * scales.gate, scale[w][half][1] = a * scales.up;
        }
      scales.advance();
    }
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
        for (int e = 0; e < 4; ++e) sum[w][j][e] = fmaf(part[j][e], scale[w][e / 2][j % 2], sum[w][j][e]);
    }
  }
}

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, 1) gemm_wgmma_kernel(const __grid_constant__ WgmmaArguments p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(p.a);
    ptx::prefetch_tensor_map(p.b);
    const int blocks = ptx::cluster_size();
#pragma unroll
    for (int i = 0; i < Config::kStages; ++i) {
      ptx::mbarrier_init(ptx::shared_address(&s.full[i]), 1);
      ptx::mbarrier_init(ptx::shared_address(&s.empty[i]), Config::kWarps * blocks);
    }
    ptx::fence_mbarrier_init();
  }
  __syncwarp();
  ptx::cluster_sync();

  const int warpgroup = __shfl_sync(0xffffffff, threadIdx.x / 128, 0);  // of one lane: the compiler knows it is uniform
  if (warpgroup == Config::kGroups) {
    ptx::setmaxnreg_dec<Config::kLoadRegisters>();
    if (threadIdx.x == Config::kGroups * 128) load<Config>(p, s);
    __syncwarp();
  } else {
    ptx::setmaxnreg_inc<Config::kMultiplyRegisters>();
    const int warp = threadIdx.x / 32;
    Work<Config> work(p);
    Multiplier<Config> m(s, warpgroup);
    while (work.next()) {
      typename Config::Acc sum[Config::kWaves][Config::kTiles][4];
      multiply_tile(m, work, sum);
      finish_fragments<64>(sum, s.slab[warp], p.out, work.row + m.row, work.column + m.column, work.split);
    }
  }
  ptx::cluster_sync();  // until then other blocks of the cluster arrive at barriers of this one
}

template <class Config>
int launch_gemm_wgmma(const GemmParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int cluster = p.plan.cluster;
  const TileMap map{ceil_div(ceil_div(p.a.rows, Config::kM), cluster), ceil_div(p.b.rows, Config::kN)};
  WgmmaArguments arguments{{}, {}, {}, p.blocks, map, map.blocks(p.plan.splits), p.a.columns, p.plan.split_k,
                           GemmOutput(p)};
  const auto operand = [](CUtensorMap& to, const Matrix& m, int box_rows) {
    return encode_boxes(to, CU_TENSOR_MAP_DATA_TYPE_UINT8, m.data, m.rows, m.columns, m.stride, box_rows,
                        Config::kStageK, CU_TENSOR_MAP_SWIZZLE_128B);
  };
  if (auto e = operand(arguments.a, p.a, Config::kM)) return e;
  if (auto e = operand(arguments.b, p.b, Config::kN / cluster)) return e;
  if (p.blocks.a) {
    const int64_t depth = ceil_div(p.a.columns, kScaleBlock);
    if (auto e = encode_boxes(arguments.a_scale, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, p.blocks.a, depth, p.a.rows,
                              p.blocks.a_stride * 4, 1, Config::kM, CU_TENSOR_MAP_SWIZZLE_NONE))
      return e;
  }
  auto kernel = gemm_wgmma_kernel<Config>;
  if (auto e = allow_shared<gemm_wgmma_kernel<Config>>(kShared)) return e;
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config{};
  config.gridDim = static_cast<unsigned>(std::min<int64_t>(p.plan.blocks / cluster, arguments.tiles) * cluster);
  config.blockDim = Config::kThreads;
  config.dynamicSmemBytes = kShared;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (auto e = cudaLaunchKernelEx(&config, kernel, arguments)) return e;
  return finish_splits(p, Config::Element::kAcc, stream);
}

}  // namespace forwardpass
