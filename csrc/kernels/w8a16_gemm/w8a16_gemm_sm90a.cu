// w8a16_gemm on wgmma m64nNk16, with swap-AB: the weight is the first operand, which a wgmma takes from registers,
// where it is upconverted. x is the second one, in shared memory as TMA stored it; its rows are the wgmma's columns, of
// which there may be as few as eight.
//
// A lane needs the weight in pairs of elements, one pair of each eight of a row. The order of K would be free, and with
// it loads of 16 bytes, if x had the same order; but x comes by TMA, which moves at least 16 bytes, and is read by the
// tensor cores. So loads are of two bytes, 32 for the 64 elements that a lane has of a stage; four loads of 16 bytes
// would need 16 shuffles and 48 selections and permutations.
//
// A stage of 128 x 128 takes the tensor cores 1024 clocks. For it a consumer warp issues 198 instructions (e4m3 to
// fp16), 263 (int8 to fp16), 294 (e4m3 to bf16) or 295 (int8 to bf16), and a scheduler has two such warps. Static
// counts, nvcc 13.0. Shared memory is what binds: 48 KB written, 64 KB read by wgmma, and 16 KB by loads that use half
// of its width, 1152 clocks. (A tile of 256 rows of x would need 960, and 128 more registers, which only accumulators
// without promotion leave.)
#include "device/dispatch.h"
#include "device/gemm_sm90a.cuh"
#include "device/upconvert.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

// a: the 8-bit weight, upconverted to X; b: x.
template <Dtype X>
struct Upconverted {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = size_of(X);
  static constexpr bool kSwapAB = true, kPromoted = false;
};

template <Dtype X, int M, int N, int Stages>
using UpconvertedConfig = WgmmaConfig<Upconverted<X>, M, N, 2, Stages>;

template <Dtype X, int M, int N, int Stages>
struct Consumer<UpconvertedConfig<X, M, N, Stages>> : ConsumerBase<UpconvertedConfig<X, M, N, Stages>> {
  using Config = UpconvertedConfig<X, M, N, Stages>;
  using ConsumerBase<Config>::pipeline, ConsumerBase<Config>::row;
  static_assert(Config::kWaves == 1);
  static constexpr int kHalf = Config::kStageK / 2, kSteps = kHalf / 16;
  using Fragments = uint32_t[kSteps][4];  // of half a stage
  uint32_t weight;                        // address of this lane's first two elements in the first stage
  uint32_t x;                             // low half of x's descriptor in the first stage

  __device__ Consumer(typename Config::SharedStorage& s, int warpgroup, bool) : ConsumerBase<Config>(s, warpgroup) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    weight = uniform(ptx::shared_address(&s.stage[0].a[row + g][g * 16 + lane % 4 * 2]), lane);
    x = uniform(ptx::descriptor(ptx::shared_address(s.stage[0].b)));
  }

  template <Dtype W>
  __device__ void upconvert_half(Fragments& upconverted, int half) const {
    const uint32_t at = weight + pipeline.stage * sizeof(typename Config::Stage);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t from = at ^ (half * kSteps + step) * 16;  // the swizzle of TMA
      constexpr int kBelow = 8 * Config::kStageK;
      upconverted[step][0] = upconvert<W, X>(ptx::load_shared_16<0>(from));
      upconverted[step][1] = upconvert<W, X>(ptx::load_shared_16<kBelow>(from));
      upconverted[step][2] = upconvert<W, X>(ptx::load_shared_16<8>(from));
      upconverted[step][3] = upconvert<W, X>(ptx::load_shared_16<kBelow + 8>(from));
    }
  }
  // One group of wgmmas: all rows of x by half a stage.
  __device__ void mma(float (&acc)[Config::kTiles][4], const Fragments& upconverted, int half, int stage) const {
    constexpr int kBoxUnits = sizeof(Config::Stage::b[0]) / ptx::kDescriptorUnit;
    const uint32_t from = x + stage * Config::kStageUnits + half * kBoxUnits;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ptx::wgmma_k16<X>(acc, upconverted[step], from + step * 32 / ptx::kDescriptorUnit, half > 0 || step > 0);
    ptx::wgmma_commit();
  }
};

// Every 128 of K the partial accumulators are added to a second set, times the weight's scale of that block if it has
// block scales. One half of a stage is upconverted while the wgmmas of the other half run.
template <Dtype W, class Config>
__device__ inline void mainloop_upconverting(Consumer<Config>& m, const TileScheduler<Config>& scheduler,
                                             float (&acc)[Config::kTiles][4]) {
  const WgmmaArguments& p = scheduler.p;
  const int64_t blocks = ceil_div(p.k, kScaleBlock), row = scheduler.row + m.row + threadIdx.x % 32 / 4;
  const float* scales[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    scales[i] =
        p.row_scale ? p.row_scale + min(row + i * 8, p.out.columns - 1) * blocks + scheduler.k / kScaleBlock : nullptr;
#pragma unroll
  for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) acc[j][e] = 0;
  typename Consumer<Config>::Fragments upconverted[2];
  m.pipeline.wait_full();
  m.template upconvert_half<W>(upconverted[0], 0);
#pragma unroll 1
  for (int i = 0; i < scheduler.slices; ++i) {
    const int stage = m.pipeline.stage;
    float partial[Config::kTiles][4];
    m.mma(partial, upconverted[0], 0, stage);
    m.template upconvert_half<W>(upconverted[1], 1);
    m.mma(partial, upconverted[1], 1, stage);
    const float scale[2] = {scales[0] ? scales[0][i] : 1, scales[1] ? scales[1][i] : 1};
    m.pipeline.advance();
    if (i + 1 < scheduler.slices) {
      m.pipeline.wait_full();
      ptx::wgmma_wait<1>();
      m.template upconvert_half<W>(upconverted[0], 0);
    }
    ptx::wgmma_wait<0>();
    m.release(stage);
#pragma unroll
    for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) acc[j][e] = fmaf(partial[j][e], scale[e / 2], acc[j][e]);
  }
}

template <Dtype X, int M, int N, int Stages>
__device__ inline void mainloop(Consumer<UpconvertedConfig<X, M, N, Stages>>& m,
                                const TileScheduler<UpconvertedConfig<X, M, N, Stages>>& scheduler,
                                float (&acc)[1][UpconvertedConfig<X, M, N, Stages>::kTiles][4]) {
  if (scheduler.p.a_dtype == Dtype::i8)
    mainloop_upconverting<Dtype::i8>(m, scheduler, acc[0]);
  else
    mainloop_upconverting<Dtype::e4m3>(m, scheduler, acc[0]);
}

template <Dtype X, int M, int N, int Stages>
__device__ inline void store_tile(const Consumer<UpconvertedConfig<X, M, N, Stages>>& m,
                                  const TileScheduler<UpconvertedConfig<X, M, N, Stages>>& scheduler,
                                  const float (&acc)[1][UpconvertedConfig<X, M, N, Stages>::kTiles][4],
                                  typename UpconvertedConfig<X, M, N, Stages>::SharedStorage& s, const GemmOutput& o,
                                  int, int) {
  finish_transposed(acc, s.staging[threadIdx.x / 32], o, scheduler.column, scheduler.row + m.row, scheduler.split);
}

// Memory binds: 112 KB of the weight are in flight.
template <Dtype X>
using Tile128x16 = UpconvertedConfig<X, 128, 16, 8>;
template <Dtype X>
using Tile128x64 = UpconvertedConfig<X, 128, 64, 6>;
// 144 KB are in flight while one stage is used. In clusters of two a block reads 32 bytes a clock from L2, of about 39
// that are available.
template <Dtype X>
using Tile128x128 = UpconvertedConfig<X, 128, 128, 4>;

namespace {

template <template <Dtype> class Tile>
cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) { return launch_gemm_wgmma<Tile<X()>>(p, stream); });
}
// The tile's rows are the output's columns; a cluster shares the rows of x.
template <template <Dtype> class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_90a,
          .tile_m = Tile<Dtype::f16>::kN,
          .tile_n = Tile<Dtype::f16>::kM,
          .cluster = Cluster::along_n,
          .launch = launch<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile128x64>(), row<Tile128x16>()};
const GemmKernels<W8a16GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
