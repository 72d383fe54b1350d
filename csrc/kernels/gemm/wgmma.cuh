#pragma once
// GEMM on wgmma for sm_90a: int8, e4m3, and 8-bit weights times 16-bit activations. Blocks are persistent: each
// computes tile after tile of the output. One producer thread loads 128 of K at a time by TMA, which zero-fills outside
// the matrices, into a pipeline of stages. Two consumer warpgroups run the main loop, with operands in shared memory
// or, upconverted, in registers, and the epilogue of a tile while the producer loads the next one's stages.
#include "device/dependent_launch.cuh"
#include "device/fragments.cuh"
#include "device/pipeline.cuh"
#include "device/ptx_sm90a.cuh"
#include "device/shared_bytes.cuh"
#include "device/tma_map.h"
#include "device/wgmma.cuh"
#include "kernels/gemm/arguments.cuh"
#include "kernels/gemm/kernel.h"
#include "kernels/gemm/reduce_splits.h"
#include "schedule/cluster_tiles.cuh"

namespace forwardpass {

// What a kernel's tile is made of. Its two consumer warpgroups have 64 rows each; a tile of fewer than 128 rows is
// computed as its transpose: the 64 rows of a wgmma come from b, and the N of the instruction is all rows of a.
struct WgmmaTile {
  int m, n;  // of the output, what a block computes
  int stages;
  int stage_k = kScaleBlock;  // of K, in a stage; as many bytes of a's rows
  int experts = 0;            // of a grouped GEMM: the most that its list has room for
};

// The same for a grouped GEMM.
constexpr WgmmaTile with_experts(WgmmaTile tile, int experts) {
  tile.experts = experts;
  return tile;
}

// What is multiplied, in which tiles; which tile when and of which output; how; and what becomes of the accumulators.
template <class Element_, WgmmaTile kTile, template <class> class Schedule_, template <class> class Mainloop_,
          template <class> class Epilogue_>
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
  static constexpr int kExperts = kTile.experts;
  static constexpr bool kTileSwapped = Element::kSwapAB;  // the tile's rows are the output's columns

  using Schedule = Schedule_<WgmmaConfig>;
  // A stage's parts: its a and the b of the first pass, the b of the second.
  using Pipeline = forwardpass::Pipeline<kStages, kPasses>;
  using Accumulators = Fragments<Acc, 1, kTilesN, ptx::kWgmmaRows>;
  using Mainloop = Mainloop_<WgmmaConfig>;
  using Epilogue = Epilogue_<WgmmaConfig>;

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

// Whether the first stages' b may be loaded before earlier kernels have ended, if it is what none of them writes.
template <class Config>
constexpr bool kLoadsEarly =
    Config::Schedule::kClusterSums && !Config::Element::kSwapAB && Config::Mainloop::Rows::kLoadsEarly;

template <class Config>
struct WgmmaArguments {
  GemmOutput out;
  TileMap map;        // of clusters
  bool b_first;       // the operation's b may be read before earlier kernels have ended
  bool cluster_sums;  // the blocks of a cluster have all splits of its tiles
  CUtensorMap a, b;
  Groups groups;
  typename Config::Mainloop::Arguments mainloop;
};

// A matrix by boxes of rows, of as many bytes as the swizzle has.
inline cudaError_t encode_operand(CUtensorMap& to, const Matrix& m, int box_rows, int box_bytes) {
  const int64_t size = size_of(m.dtype);
  return encode_boxes(to, size == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, m.data, m.rows,
                      m.columns, m.stride * size, box_rows, box_bytes / size,
                      box_bytes == 128 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_64B);
}

// Where a main loop's rows of a come from: its Rows. These are of a matrix; window_tma.cuh has those of a convolution.
struct MatrixRows {
  static constexpr WindowLimits kWindows = {};
  static constexpr bool kLoadsEarly = true;
  // On the host: a's map; the depth of the product, which the schedule cuts up.
  static cudaError_t encode(CUtensorMap& to, const GemmParams&, const Matrix& a, int rows, int bytes) {
    return encode_operand(to, a, rows, bytes);
  }
  static int64_t depth(const GemmParams&, const Matrix& a) { return a.columns; }

  // The producer's, of a tile. advance() follows each stage.
  int row;
  template <class P, class Tile>
  __device__ MatrixRows(const P&, const Tile& tile) : row(static_cast<int>(tile.row)) {}
  __device__ void load(uint32_t to, const CUtensorMap& map, int k, uint32_t full) const {
    ptx::tma_load(to, map, k, row, full);
  }
  __device__ int column_of_b(int k) const { return k; }
  __device__ void advance() {}
};

// What a main loop has of the arguments and of the producer, where it has no scales of its own.
struct NoScales {
  using Rows = MatrixRows;
  static constexpr bool kGated = true;  // the epilogue has gated activations
  struct Arguments {};
  static cudaError_t set_arguments(Arguments&, const GemmParams&, int) { return cudaSuccess; }
  // Before the first tile, by all threads.
  template <class P, class SharedStorage>
  __device__ static void begin(const P&, SharedStorage&) {}
  // The producer's: of a stage, beside its operands; a tile's.
  template <class P>
  __device__ static int scale_bytes(const P&) {
    return 0;
  }
  template <class P, class Tile>
  __device__ static NoScales scales_of(const P&, const Tile&) {
    return {};
  }
  template <class SharedStorage>
  __device__ void load(SharedStorage&, int, int, uint32_t) const {}
};

// The producer's main function. A block loads its own rows of a, and its share of the rows of b for all blocks of its
// cluster that have the same split: with two passes those of one of them. So a stage's loads are issued as its parts
// become empty, which spreads them over its time: as a burst they keep wgmma from shared memory, of which it needs half
// (fp8 128 x 256, modelled: 1277 clocks a stage as one burst, 1159 in parts).
template <class Config>
__device__ inline void producer(const WgmmaArguments<Config>& p, typename Config::SharedStorage& s) {
  const typename Config::Schedule schedule(p, s);
  const int bytes = sizeof(typename Config::Stage) + Config::Mainloop::scale_bytes(p);
  const int share = Config::share_of_b(p.map.share());
  typename Config::Pipeline pipeline(s.barriers());
  using Rows = typename Config::Mainloop::Rows;
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
  if constexpr (kLoadsEarly<Config>)
    if (p.b_first) {
      const GemmTile tile = schedule.first();
      auto early = pipeline;
      Rows rows(p, tile);
      for (; ahead < min(Config::kStages, tile.slices(Config::kStageK)); ++ahead, early.advance(), rows.advance())
        load_b(tile, ahead, rows.column_of_b(static_cast<int>(tile.k) + ahead * Config::kStageK), early.acquire(bytes));
      ptx::wait_for_earlier_kernels();
    }
  schedule.for_each([&](const auto& tile) {
    const int end = static_cast<int>(tile.k_end);
    Rows rows(p, tile);
    const auto scales = Config::Mainloop::scales_of(p, tile);
    for (int k = static_cast<int>(tile.k); k < end; k += Config::kStageK, pipeline.advance(), rows.advance()) {
      const bool has_b = kLoadsEarly<Config> && ahead-- > 0;
      const uint32_t full = has_b ? pipeline.full(pipeline.stage) : pipeline.acquire(bytes);
      rows.load(ptx::shared_address(s.stage[pipeline.stage].a), p.a, k, full);
      scales.load(s, pipeline.stage, k, full);
      if (!has_b) load_b(tile, pipeline.stage, rows.column_of_b(k), full);
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

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kBoundThreads, 1)
    gemm_wgmma_kernel(const __grid_constant__ WgmmaArguments<Config> p) {
  extern __shared__ __align__(1024) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  using Schedule = typename Config::Schedule;
  if (threadIdx.x == 0) {
    ptx::prefetch_tensor_map(p.a);
    ptx::prefetch_tensor_map(p.b);
    s.barriers().init(Config::kWarps * p.map.share());
    ptx::fence_mbarrier_init();
  }
  Config::Mainloop::begin(p, s);
  Schedule(p, s).begin(static_cast<int>(p.out.rows));
  __syncwarp();
  ptx::cluster_sync();
  const int warpgroup = uniform(threadIdx.x / 128);
  // By whole warps: one lane would not get ahead of others that wait.
  if (!(kLoadsEarly<Config> && p.b_first) || warpgroup != Config::kConsumers) ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();

  if (warpgroup == Config::kConsumers) {
    ptx::setmaxnreg_dec<Config::kProducerRegisters>();
    if (threadIdx.x == Config::kConsumers * 128) producer<Config>(p, s);
    __syncwarp();
    Schedule::join(p);
  } else {
    ptx::setmaxnreg_inc<Config::kConsumerRegisters>();
    const ConsumerPlace<Config> place(warpgroup);
    typename Config::Mainloop mainloop(p, s, place);
    typename Schedule::Output output(p.out);
    typename Config::Epilogue epilogue(s, output);
    const Schedule schedule(p, s);
    schedule.for_each([&](const auto& tile) {
      schedule.enter(tile, output, epilogue, s);
      typename Config::Accumulators acc;
      mainloop(tile, acc, [&] { epilogue.begin(tile, place.row, place.column); });
      schedule.store(acc, tile, epilogue, s, place);
    });
    schedule.finish(s, p.out);  // behind the loop, in which the registers of cluster sums would spill
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
  using Schedule = typename Config::Schedule;
  using Rows = typename Config::Mainloop::Rows;
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const int share = p.choice.cluster, share_bits = share - 1;  // one block or two
  const bool cluster_sums = p.choice.cluster_sums;
  const int64_t splits = p.choice.splits, cluster = cluster_sums ? share * splits : share;
  const Matrix &a = Element::kSwapAB ? p.b : p.a, &b = Element::kSwapAB ? p.a : p.b;
  const int64_t columns = Element::kSwapAB ? b.rows : p.columns();
  WgmmaArguments<Config> arguments{
      .out = GemmOutput(p, true),
      .map = TileMap(Schedule::tile_rows(p, a.rows, Config::kM * share), ceil_div(columns, Config::kN),
                     cluster_sums ? 1 : splits, Rows::depth(p, a), p.choice.split_k, share_bits),
      .b_first = p.b_first,
      .cluster_sums = cluster_sums,
      .groups = p.groups};
  if (auto e = Rows::encode(arguments.a, p, a, Config::kM, Config::kStageK)) return e;
  if (auto e = encode_operand(arguments.b, b, Config::share_of_b(share), Config::kBoxBytes)) return e;
  if (auto e = Config::Mainloop::set_arguments(arguments.mainloop, p, Config::kM)) return e;
  if (auto e = allow_shared<gemm_wgmma_kernel<Config>>(kShared)) return e;
  // A cluster that adds its splits has one tile: its stages become the place for the sums.
  const int64_t tiles = arguments.map.tiles;
  const Launch launch{.grid = (cluster_sums ? tiles : std::min(p.choice.blocks / cluster, tiles)) * cluster,
                      .block = Config::kThreads,
                      .shared = kShared - ExpertStorage<Config::kExperts>::unused(p.groups.experts),
                      .cluster = static_cast<int>(cluster),
                      .dependent = true};
  if (auto e = launch_kernel(gemm_wgmma_kernel<Config>, launch, stream, arguments)) return e;
  return reduce_splits(p, Element::kAcc, stream);
}

// A row of a table.
template <class Config>
constexpr GemmKernel wgmma_row(GemmKind kind, int stage_clocks = 0) {
  using Element = typename Config::Element;
  return {.arch = sm_90a,
          .tile_m = Element::kSwapAB ? Config::kN : Config::kM,
          .tile_n = Element::kSwapAB ? Config::kM : Config::kN,
          .kind = kind,
          .limits = {.experts = Config::kExperts},
          .cluster = Element::kSwapAB ? Cluster::along_n : Cluster::along_m,  // it shares the kernel's b
          .stage_clocks = stage_clocks,
          .quantizes = Config::Epilogue::kQuantizes,
          .gated_blocks = Element::kSwapAB || Config::kN % kScaleBlock == 0,  // else a tile has parts of four blocks
          .windows = Config::Mainloop::Rows::kWindows,
          .cluster_sums = Config::Schedule::kClusterSums,
          .launch = launch_gemm_wgmma<Config>,
          .resident_clusters = resident_clusters<Config>};
}

// The rows of a table whose operands and main loop are the same.
template <GemmKind kKind, class Element, template <class> class Mainloop>
struct WgmmaRows {
  template <WgmmaTile kTile, template <class> class Schedule, template <class> class Epilogue>
  static constexpr GemmKernel row(int stage_clocks = 0) {
    return wgmma_row<WgmmaConfig<Element, kTile, Schedule, Mainloop, Epilogue>>(kKind, stage_clocks);
  }
  template <WgmmaTile kTile, int kExperts, template <class> class Epilogue>
  static constexpr GemmKernel grouped(int stage_clocks = 0) {
    return row<with_experts(kTile, kExperts), GroupedClusterTiles, Epilogue>(stage_clocks);
  }
};

}  // namespace forwardpass
