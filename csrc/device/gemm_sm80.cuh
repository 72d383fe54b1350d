#pragma once
// GEMM on mma.sync: int8 from sm_80 on, e4m3 from sm_89 on. A block computes one tile of the output. Slices of kStageK
// of K come through a pipeline of stages in shared memory by cp.async; kStages - 1 of them are in flight while one is
// used.
//
// Tensor cores bind first, then issue. A warp's 64 x 64 x 32 takes 32 mma and 8 ldmatrix, 0.25 per mma; the copies of a
// stage of 64 of K are 8 per thread, 0.125 per mma. L2: (M + N) / (M N) bytes per multiply-add, so 128 x 128 needs 32
// bytes a clock for an A100's multiprocessor, which gets 47 (5120 a clock for 108).
#include "device/dependent_launch.cuh"
#include "device/fragment_epilogue.cuh"
#include "device/fragments.cuh"
#include "device/gemm_operands.cuh"
#include "device/ptx_sm80.cuh"
#include "device/shared_bytes.cuh"
#include "device/swizzled_rows.cuh"

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
  int stage_k, stages;   // bytes of K in a stage
  int blocks_per_sm;     // that share a multiprocessor; it limits the registers
};

template <class Element_, MmaTile kTile>
struct MmaMainloop;

template <class Element_, MmaTile kTile>
struct MmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = kTile.m, kN = kTile.n, kStageK = kTile.stage_k, kStages = kTile.stages;
  static constexpr int kWarpsM = kTile.warps_m, kWarpsN = kTile.warps_n, kThreads = 32 * kWarpsM * kWarpsN,
                       kBlocksPerSm = kTile.blocks_per_sm;
  static constexpr int kWarpM = kM / kWarpsM, kWarpN = kN / kWarpsN;
  static constexpr int kTilesM = kWarpM / 16, kTilesN = kWarpN / 8;  // of a warp, each of 16 x 8
  static_assert(!Element::kPromoted || kStageK == kScaleBlock, "promotion is once a stage");

  // Of a grouped GEMM, at most: with the list of 144 two blocks of 128 x 128 fit the 100 KB of an L40S.
  static constexpr int kExperts = !kIsGrouped<Element> ? 0 : kM * kN > 64 * 128 ? 144 : 512;

  using Schedule = std::conditional_t<kIsGrouped<Element>, SharedTiles<MmaConfig>, OneTile<MmaConfig>>;
  __device__ static uint32_t rank() { return 0; }  // there are no clusters
  using Accumulators = Fragments<Acc, kTilesM, kTilesN>;
  using Pipeline = CpAsyncPipeline<kStages>;
  using Mainloop = MmaMainloop<Element, kTile>;
  using Epilogue = FragmentEpilogue<Accumulators, Element::kBlockScaled>;

  struct SharedStorage {
    union {
      struct {
        uint8_t a[kStages][kM * kStageK], b[kStages][kN * kStageK];
        float a_scale[kStages][Element::kBlockScaled ? kM : 4];
      } stage;
      typename Epilogue::Storage staging[kWarpsM * kWarpsN];
    };
    [[no_unique_address]] typename Schedule::Storage tile;
    [[no_unique_address]] ExpertStorage<kExperts> experts;
  };
};

// Copies kRows rows of an operand, slice after slice of kSliceK bytes. Rows outside the matrix read its last row again,
// as their outputs are not stored; columns outside it are zero.
template <int kSliceK, int kRows, int kThreads>
struct OperandCopy {
  using Share = CopyShare<kSliceK, kRows, kThreads>;
  const uint8_t* row[Share::kCount];
  int bytes_left;  // from this thread's chunk to the end of K, which is below 2^30
  uint32_t to;

  __device__ OperandCopy(const Matrix& m, int64_t first_row, int64_t k, int64_t k_end, uint8_t* stage) {
    bytes_left = static_cast<int>(k_end - k) - Share::chunk() * 16;
    to = ptx::shared_address(stage) + Share::offset();
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const int64_t r = min(first_row + Share::row() + i * Share::kStep, m.rows - 1);
      row[i] = static_cast<const uint8_t*>(m.data) + r * m.stride + k + Share::chunk() * 16;
    }
  }
  // Copies the slice that is `ahead` slices further, all of whose columns exist.
  __device__ void whole(int stage, int ahead) const {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) ptx::cp_async_16(address(stage, i), row[i] + ahead * kSliceK);
  }
  // The same of a slice of which some or all columns may be outside.
  __device__ void masked(int stage, int ahead) const {
    const int size = min(max(bytes_left - ahead * kSliceK, 0), 16);
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) ptx::cp_async_16(address(stage, i), row[i] + ahead * kSliceK, size);
  }
  __device__ void advance(int slices) {
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) row[i] += slices * kSliceK;
    bytes_left -= slices * kSliceK;
  }

 private:
  __device__ uint32_t address(int stage, int i) const {
    return to + stage * kRows * kSliceK + i * Share::kStep * kSliceK;
  }
};

// What block scales are where there are none, of a kernel for both.
static __device__ const float kOne = 1;

// Block scales, one per 128 of K: those of a's rows are copied with each slice; b has one for all columns of a warp,
// two if gated.
template <class Config>
struct BlockScaleCopy {
  static_assert(!Config::Element::kBlockScaled || kScaleBlock % Config::kWarpN == 0,
                "a warp's columns lie in one block");
  // Rows that a thread copies the scales of: an expert's rows begin anywhere.
  static constexpr bool kGrouped = kIsGrouped<typename Config::Element>;
  static constexpr int kRows = kGrouped ? 1 : 4;
  const float *a, *b;
  int64_t a_stride, up_offset;
  uint32_t to;
  int size, b_stride = 1;

  // warp_n: this warp's first column in the tile
  template <class Tile>
  __device__ BlockScaleCopy(const GemmArguments& p, const Tile& tile, int warp_n, float* stage) {
    const int64_t block = tile.k / kScaleBlock, k_blocks = (p.a.columns + kScaleBlock - 1) / kScaleBlock;
    const int64_t first = tile.row + threadIdx.x * kRows,
                  last_column = min(tile.column + warp_n, (kGrouped ? p.out.columns : p.b.rows) - 1);
    a = p.blocks.a + block * p.blocks.a_stride + first;
    a_stride = p.blocks.a_stride;
    b = p.blocks.b + (p.gated() ? last_column / 2 : last_column) / kScaleBlock * k_blocks + block;
    if constexpr (kGrouped) {
      b += tile.expert * block_scales_of(p.blocks, p.gated(), p.out.columns, p.a.columns);
      if (!p.blocks.a) a = b = &kOne, a_stride = b_stride = 0;  // its scales are of rows
    }
    up_offset = p.blocks.up_offset;  // 0 unless gated
    to = ptx::shared_address(stage) + threadIdx.x * kRows * 4;
    size = static_cast<int>(min(max(p.a.rows - first, int64_t{0}), int64_t{kRows})) * 4;
  }
  // Copies those of the next slice, if there is one (`inside`).
  __device__ void operator()(int stage, bool inside) {
    if (threadIdx.x < Config::kM / kRows) {
      const uint32_t in_stage = to + stage * Config::kM * 4;
      if constexpr (kGrouped) {
        ptx::cp_async_4(in_stage, a, inside ? size : 0);
      } else {
        ptx::cp_async_16(in_stage, a, inside ? size : 0);
      }
    }
    a += a_stride;
  }
};

// A lane's addresses for an operand's ldmatrix: 16 rows x 32 bytes, for each 32 bytes of a stage's K.
template <class Config>
struct MatrixAddress {
  static constexpr int kSteps = Config::kStageK / 32;
  uint32_t step[kSteps];

  // chunk: which 16 of the 32 bytes this lane's 8 x 8 matrix has
  __device__ MatrixAddress(const uint8_t* stage, int row, int chunk) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k)
      step[k] = ptx::shared_address(stage) + SwizzledRows<Config::kStageK>::offset(row, 2 * k + chunk);
  }
};

// The product of one slice of K in shared memory: acc += a b.
template <class Config>
struct SliceProduct {
  using Accumulators = typename Config::Accumulators;
  using Address = MatrixAddress<Config>;
  const Address from_a, from_b;

  // a: the four 8 x 8 matrices of an ldmatrix are rows 0-7 and 8-15 of bytes 0-15, then of bytes 16-31; b: bytes 0-15
  // and 16-31 of one n8 tile, then of the next
  __device__ SliceProduct(typename Config::SharedStorage& s, int warp_m, int warp_n, int lane)
      : from_a(s.stage.a[0], warp_m + lane % 16, lane / 16),
        from_b(s.stage.b[0], warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2) {}

  // promote(stage, partial accumulators of this slice), for elements that need it
  template <class Promote>
  __device__ void operator()(int stage, Accumulators& acc, Promote promote) const {
    if constexpr (Config::Element::kPromoted) {
      Accumulators partial;
      mma<true>(stage, partial);
      promote(stage, partial);
    } else {
      mma<false>(stage, acc);
    }
  }

 private:
  // kFromZero: acc is not read
  template <bool kFromZero>
  __device__ void mma(int stage, Accumulators& acc) const {
    constexpr typename Config::Acc kZeros[4] = {};
#pragma unroll
    for (int step = 0; step < Address::kSteps; ++step) {
      uint32_t a[Config::kTilesM][4], b[Config::kTilesN][2];
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i)
        ptx::ldmatrix_x4(a[i], from_a.step[step] + (stage * Config::kM + i * 16) * Config::kStageK);
#pragma unroll
      for (int j = 0; j < Config::kTilesN; j += 2)
        ptx::ldmatrix_x4(reinterpret_cast<uint32_t (&)[4]>(b[j]),
                         from_b.step[step] + (stage * Config::kN + j * 8) * Config::kStageK);
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i)
#pragma unroll
        for (int j = 0; j < Config::kTilesN; ++j) {
          if (kFromZero && step == 0) {
            ptx::mma_m16n8k32(acc[i][j], a[i], b[j], kZeros);
          } else {
            ptx::mma_m16n8k32(acc[i][j], a[i], b[j], acc[i][j]);
          }
        }
    }
  }
};

// The mainloop of operands that mma takes as they are.
template <class Element, MmaTile kTile>
struct MmaMainloop {
  using Config = MmaConfig<Element, kTile>;
  static constexpr int kStages = Config::kStages;
  using Pipeline = typename Config::Pipeline;
  template <int kRows>
  using Copy = OperandCopy<Config::kStageK, kRows, Config::kThreads>;
  const GemmArguments& p;
  typename Config::SharedStorage& s;
  const int warp_m, warp_n;  // this warp's first row and column in the tile

  template <class Tile>
  __device__ void operator()(const Tile& tile, typename Config::Accumulators& acc) const {
    const int whole = static_cast<int>((tile.k_end - tile.k) / Config::kStageK), slices = tile.slices(Config::kStageK);
    Copy<Config::kM> copy_a(p.a, tile.row, tile.k, tile.k_end, s.stage.a[0]);
    Copy<Config::kN> copy_b(p.b, tile.b_row, tile.k, tile.k_end, s.stage.b[0]);
    const SliceProduct<Config> product(s, warp_m, warp_n, threadIdx.x % 32);
    BlockScaleCopy<Config> scales(p, tile, warp_n, s.stage.a_scale[0]);
    const auto copy_masked = [&](int stage, int ahead, int slice) {
      if constexpr (Element::kBlockScaled) scales(stage, slice < slices);
      copy_a.masked(stage, ahead), copy_b.masked(stage, ahead);
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) copy_masked(i, i, i);
    copy_a.advance(kStages - 1), copy_b.advance(kStages - 1);

    acc.clear();
    const auto promote = [&](int stage, const auto& partial) {
      float b_scale[2] = {1, 1};
      if constexpr (Element::kBlockScaled) b_scale[0] = scales.b[0], b_scale[1] = scales.b[scales.up_offset];
      scales.b += scales.b_stride;
#pragma unroll
      for (int i = 0; i < Config::kTilesM; ++i)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          float a_scale = 1;
          if constexpr (Element::kBlockScaled) a_scale = s.stage.a_scale[stage][warp_m + acc.row(i, 2 * half)];
          const float scale[2] = {a_scale * b_scale[0], a_scale * b_scale[1]};
#pragma unroll
          for (int j = 0; j < Config::kTilesN; ++j)
#pragma unroll
            for (int e = 2 * half; e < 2 * half + 2; ++e)
              acc[i][j][e] = fmaf(partial[i][j][e], scale[j % 2], acc[i][j][e]);
        }
    };

    // The steady part, in which all copies are of whole slices, in rounds of kStages, so that stages and columns are
    // constants. With promotion, an exit after each slice keeps the assembler from interleaving neighbouring slices,
    // for which it lacks the registers (a branch that is never taken does not help: 8 to 140 bytes of spills).
    constexpr bool kExits = Element::kPromoted;
    const int steady = max(whole - kStages + 1, 0);
    const auto round = [&](int slices_left) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        Pipeline::wait();
        if constexpr (Element::kBlockScaled) scales(Pipeline::before(stage), true);
        copy_a.whole(Pipeline::before(stage), stage), copy_b.whole(Pipeline::before(stage), stage);
        ptx::cp_async_commit();
        product(stage, acc, promote);
        if (kExits && slices_left == stage + 1) return;
      }
      copy_a.advance(kStages), copy_b.advance(kStages);
    };
#pragma unroll 1
    for (int left = steady; left >= (kExits ? 1 : kStages); left -= kStages) round(left);

    int slice = kExits ? steady : steady - steady % kStages, stage = slice % kStages;
    // Computed anew: addresses that both loops share would be moved between registers in the first one, 708 instead of
    // 687 instructions for 2^20 MAC of e4m3.
    const int next_k = tile.k + (slice + kStages - 1) * Config::kStageK;
    copy_a = Copy<Config::kM>(p.a, tile.row, next_k, tile.k_end, s.stage.a[0]);
    copy_b = Copy<Config::kN>(p.b, tile.b_row, next_k, tile.k_end, s.stage.b[0]);
#pragma unroll 1
    for (int ahead = 0; slice < slices; ++slice, ++ahead) {
      Pipeline::wait();
      copy_masked(Pipeline::before(stage), ahead, slice + kStages - 1);
      product(stage, acc, promote);
      stage = Pipeline::after(stage);
    }
    Pipeline::drain();
  }
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
  constexpr bool kGrouped = kIsGrouped<typename Config::Element>;
  const typename Config::Schedule schedule(p, s);
  if constexpr (kGrouped) {
    if (warp == 0) schedule.list.make(static_cast<int>(p.a.rows));
    __syncthreads();
  }
  const int warp_m = warp % Config::kWarpsM * Config::kWarpM, warp_n = warp / Config::kWarpsM * Config::kWarpN;
  const typename Config::Mainloop mainloop{p, s, warp_m, warp_n};
  OutputOf<typename Config::Element> out(p.out);
  typename Config::Epilogue epilogue(s, out);
  schedule.for_each([&](const auto& tile) {
    typename Config::Accumulators acc;
    mainloop(tile, acc);
    if constexpr (kGrouped) {
      out.take(tile, schedule.list);
      epilogue.find_staging(s);
    }
    epilogue.begin(tile, warp_m, warp_n);  // it writes where the stages were
    epilogue(acc, tile, warp_m, warp_n);
  });
  if constexpr (kGrouped) {
    constexpr int kWarps = Config::kThreads / 32;
    fill_unowned_rows(schedule.list, p.out, blockIdx.x * kWarps + warp, gridDim.x * kWarps);
  }
}

template <class Config>
cudaError_t launch_gemm_mma(const GemmParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const GemmArguments arguments(p, Config::kM, Config::kN);
  if (auto e = allow_shared<gemm_mma_kernel<Config>>(kShared)) return e;
  const int64_t tiles = arguments.map.tiles;
  constexpr bool kGrouped = kIsGrouped<typename Config::Element>;
  const Launch launch{.grid = kGrouped ? std::min<int64_t>(p.choice.blocks, tiles) : tiles,
                      .block = Config::kThreads,
                      .shared = dynamic_shared<Config>(p),
                      .dependent = waits_for_earlier_kernels(p.choice.arch)};
  if (auto e = launch_kernel(gemm_mma_kernel<Config>, launch, stream, arguments)) return e;
  return reduce_split_k(p, Config::Element::kAcc, stream);
}

}  // namespace forwardpass
