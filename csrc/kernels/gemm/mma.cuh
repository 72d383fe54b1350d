#pragma once
// GEMM on mma.sync: int8 and 8-bit weights from sm_80 on, e4m3 from sm_89 on. A block computes tiles of the output, one
// or, of a grouped GEMM, many. Slices of kStageK of K come through a pipeline of stages in shared memory by cp.async;
// kStages - 1 of them are in flight while one is used.
#include "device/dependent_launch.cuh"
#include "device/fragments.cuh"
#include "device/ptx_sm80.cuh"
#include "device/shared_bytes.cuh"
#include "kernels/gemm/arguments.cuh"
#include "kernels/gemm/kernel.h"
#include "kernels/gemm/reduce_splits.h"
#include "schedule/grouped_tile.cuh"

namespace forwardpass {

// A pipeline of stages that all threads fill by cp.async: kStages - 1 are in flight while one is used.
template <int kStages>
struct CpAsyncPipeline {
  // The next stage has arrived for all warps, and all have read the one before it, which is filled next.
  __device__ static void wait() {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
  }
  // Nothing is in flight any more, and no warp reads a stage.
  __device__ static void drain() {
    ptx::cp_async_wait<0>();
    __syncthreads();
  }
  __device__ static int before(int stage) { return stage == 0 ? kStages - 1 : stage - 1; }
  __device__ static int after(int stage) { return stage == kStages - 1 ? 0 : stage + 1; }
};

// What a kernel's tile is made of.
struct MmaTile {
  int m, n;              // of the output, what a block computes
  int warps_m, warps_n;  // that divide it
  int stage_k, stages;   // elements of K in a stage
  int blocks_per_sm;     // that share a multiprocessor; it limits the registers
  int experts = 0;       // of a grouped GEMM: the most that its list has room for
};

// The same for a grouped GEMM.
constexpr MmaTile with_experts(MmaTile tile, int experts) {
  tile.experts = experts;
  return tile;
}

// What is multiplied, in which tiles; which tile when and of which output; how; and what becomes of the accumulators.
template <class Element_, MmaTile kTile, template <class> class Schedule_, template <class> class Mainloop_,
          template <class> class Epilogue_>
struct MmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = kTile.m, kN = kTile.n, kStageK = kTile.stage_k, kStages = kTile.stages;
  static constexpr int kWarpsM = kTile.warps_m, kWarpsN = kTile.warps_n, kWarps = kWarpsM * kWarpsN,
                       kThreads = 32 * kWarps, kBlocksPerSm = kTile.blocks_per_sm, kExperts = kTile.experts;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static_assert(!Element::kPromoted || kStageK == kScaleBlock, "promotion is once a stage");
  // Swap-AB: the rows of an mma are b's, those of a tile a's.
  static constexpr bool kTileSwapped = false;
  static constexpr int kTilesM = kWarpM / (Element::kSwapAB ? 8 : 16), kTilesN = kWarpN / (Element::kSwapAB ? 16 : 8);

  using Schedule = Schedule_<MmaConfig>;
  using Accumulators =
      std::conditional_t<Element::kSwapAB, Fragments<Acc, kTilesN, kTilesM>, Fragments<Acc, kTilesM, kTilesN>>;
  using Pipeline = CpAsyncPipeline<kStages>;
  using Mainloop = Mainloop_<MmaConfig>;
  using Epilogue = Epilogue_<MmaConfig>;

  struct SharedStorage {
    union {
      typename Mainloop::Stages stage;
      typename Epilogue::Storage staging[kWarps];
    };
    [[no_unique_address]] typename Schedule::Storage tile;
    [[no_unique_address]] ExpertStorage<kExperts> experts;
  };
};

// The kernel of every Config.
template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocksPerSm)
    gemm_mma_kernel(const __grid_constant__ GemmArguments p) {
  extern __shared__ __align__(128) uint8_t shared[];
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  const int warp = threadIdx.x / 32;
  const typename Config::Schedule schedule(p, s);
  schedule.begin(static_cast<int>(p.a.rows));
  const int warp_m = warp % Config::kWarpsM * Config::kWarpM, warp_n = warp / Config::kWarpsM * Config::kWarpN;
  const typename Config::Mainloop mainloop{p, s, warp_m, warp_n};
  typename Config::Schedule::Output output(p.out);
  typename Config::Epilogue epilogue(s, output);
  schedule.for_each([&](const auto& tile) {
    typename Config::Accumulators acc;
    mainloop(tile, acc);
    schedule.enter(tile, output, epilogue, s);  // behind the main loop, which needs the registers
    epilogue.begin(tile, warp_m, warp_n);       // it writes where the stages were
    epilogue(acc, tile, warp_m, warp_n);
  });
  schedule.finish(p.out, warp, Config::kWarps);
}

template <class Config>
cudaError_t launch_gemm_mma(const GemmParams& p, cudaStream_t stream) {
  using Schedule = typename Config::Schedule;
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const GemmArguments arguments(p, Schedule::tile_rows(p, p.a.rows, Config::kM), Config::kN);
  if (auto e = allow_shared<gemm_mma_kernel<Config>>(kShared)) return e;
  const int64_t tiles = arguments.map.tiles;
  const Launch launch{.grid = Schedule::kPersistent ? std::min<int64_t>(p.choice.blocks, tiles) : tiles,
                      .block = Config::kThreads,
                      .shared = kShared - ExpertStorage<Config::kExperts>::unused(p.groups.experts),
                      .dependent = waits_for_earlier_kernels(p.choice.arch)};
  if (auto e = launch_kernel(gemm_mma_kernel<Config>, launch, stream, arguments)) return e;
  return reduce_splits(p, Config::Element::kAcc, stream);
}

// A row of a table. blocks_per_sm: of persistent blocks.
template <class Config>
constexpr GemmKernel mma_row(GemmKind kind, Arch arch, int blocks_per_sm = Config::kBlocksPerSm) {
  return {.arch = arch,
          .tile_m = Config::kM,
          .tile_n = Config::kN,
          .kind = kind,
          .limits = {.experts = Config::kExperts},
          .blocks_per_sm = blocks_per_sm,
          .launch = launch_gemm_mma<Config>};
}

// The rows of a table whose operands, main loop and epilogue are the same.
template <GemmKind kKind, class Element, template <class> class Mainloop, template <class> class Epilogue>
struct MmaRows {
  template <MmaTile kTile>
  static constexpr GemmKernel one(Arch arch) {
    return mma_row<MmaConfig<Element, kTile, OneTile, Mainloop, Epilogue>>(kKind, arch);
  }
  template <MmaTile kTile, int kExperts>
  static constexpr GemmKernel grouped(Arch arch, int blocks_per_sm = kTile.blocks_per_sm) {
    constexpr MmaTile kWithList = with_experts(kTile, kExperts);
    return mma_row<MmaConfig<Element, kWithList, GroupedTiles, Mainloop, Epilogue>>(kKind, arch, blocks_per_sm);
  }
};

}  // namespace forwardpass
