// w8a16_gemm on wgmma m64nNk16, the product made transposed: the weight is the first operand, which a wgmma takes from
// registers, where it is widened; x is the second one, in shared memory as TMA put it there, and its rows are the
// wgmma's columns, of which there may be as few as eight.
//
// A lane's numbers of the weight are two and two of each 16 of a row. The order of K would be free, and loads of 16
// bytes with it, had x the same order; but x comes by TMA, which moves no less than 16 bytes, and is read by the tensor
// cores. So loads are of two bytes, 32 for the 64 numbers that a lane has of a stage; behind four of 16 bytes there
// would be 16 shuffles and 48 selections and permutations.
//
// A stage of 128 x 128 is 1024 clocks of the tensor cores. A multiplying warp issues for it 198 instructions (e4m3 to
// fp16), 263 (int8 to fp16), 294 (e4m3 to bf16) or 295 (int8 to bf16), and a scheduler has two such warps. Static
// counts, nvcc 13.0. Shared memory: 48 KB written, 64 KB read by wgmma, and 16 KB by loads that use half of its width,
// 1152 clocks: it binds. (x of 256 rows would need 960, and 128 registers more, which only sums that need no promotion
// leave.)
#include "device/dispatch.h"
#include "device/gemm_sm90a.cuh"
#include "device/widen.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

// a: the weight, 8-bit, widened to X; b: x.
template <Dtype X>
struct Widened {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = size_of(X);
  static constexpr bool kExchanged = true, kPromoted = false;
};

template <Dtype X, int M, int N, int Stages>
using WidenedConfig = WgmmaConfig<Widened<X>, M, N, 2, Stages>;

template <Dtype X, int M, int N, int Stages>
struct Multiplier<WidenedConfig<X, M, N, Stages>> : Consumer<WidenedConfig<X, M, N, Stages>> {
  using Config = WidenedConfig<X, M, N, Stages>;
  using Consumer<Config>::ring, Consumer<Config>::row;
  static_assert(Config::kWaves == 1);
  static constexpr int kHalf = Config::kStageK / 2, kSteps = kHalf / 16;
  using Fragments = uint32_t[kSteps][4];  // of half a stage
  uint32_t weight;                        // in the first stage: this lane's first two numbers
  uint32_t x;                             // low half of the descriptor in the first stage

  __device__ Multiplier(typename Config::SharedStorage& s, int group, bool) : Consumer<Config>(s, group) {
    const int lane = threadIdx.x % 32, g = lane / 4;
    weight = kept(ptx::shared_address(&s.stage[0].a[row + g][g * 16 + lane % 4 * 2]), lane);
    x = kept(ptx::descriptor(ptx::shared_address(s.stage[0].b)));
  }

  template <Dtype W>
  __device__ void widen_half(Fragments& wide, int half) const {
    const uint32_t at = weight + ring.stage * sizeof(typename Config::Stage);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t from = at ^ (half * kSteps + step) * 16;  // TMA's swizzle
      constexpr int kBelow = 8 * Config::kStageK;
      wide[step][0] = widen<W, X>(ptx::load_shared_16<0>(from));
      wide[step][1] = widen<W, X>(ptx::load_shared_16<kBelow>(from));
      wide[step][2] = widen<W, X>(ptx::load_shared_16<8>(from));
      wide[step][3] = widen<W, X>(ptx::load_shared_16<kBelow + 8>(from));
    }
  }
  // One group of wgmmas: all rows of x by half a stage.
  __device__ void multiply(float (&sum)[Config::kTiles][4], const Fragments& wide, int half, int stage) const {
    constexpr int kBoxUnits = sizeof(Config::Stage::b[0]) / ptx::kDescriptorUnit;
    const uint32_t from = x + stage * Config::kStageUnits + half * kBoxUnits;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ptx::wgmma_k16<X>(sum, wide[step], from + step * 32 / ptx::kDescriptorUnit, half > 0 || step > 0);
    ptx::wgmma_commit();
  }
};

// Sums go to a second accumulator every 128 of K, times the weight's scale there, if it has such scales. While a half
// of a stage is multiplied the next one is widened.
template <Dtype W, class Config>
__device__ inline void multiply_widened(Multiplier<Config>& m, const Work<Config>& work,
                                        float (&sum)[Config::kTiles][4]) {
  const WgmmaArguments& p = work.p;
  const int64_t blocks = ceil_div(p.k, kScaleBlock), row = work.row + m.row + threadIdx.x % 32 / 4;
  const float* scales[2];
#pragma unroll
  for (int i = 0; i < 2; ++i)
    scales[i] =
        p.row_scale ? p.row_scale + min(row + i * 8, p.out.columns - 1) * blocks + work.k / kScaleBlock : nullptr;
#pragma unroll
  for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 4; ++e) sum[j][e] = 0;
  typename Multiplier<Config>::Fragments wide[2];
  m.ring.wait();
  m.template widen_half<W>(wide[0], 0);
#pragma unroll 1
  for (int i = 0; i < work.slices; ++i) {
    const int stage = m.ring.stage;
    float part[Config::kTiles][4];
    m.multiply(part, wide[0], 0, stage);
    m.template widen_half<W>(wide[1], 1);
    m.multiply(part, wide[1], 1, stage);
    const float scale[2] = {scales[0] ? scales[0][i] : 1, scales[1] ? scales[1][i] : 1};
    m.ring.advance();
    if (i + 1 < work.slices) {
      m.ring.wait();
      ptx::wgmma_wait<1>();
      m.template widen_half<W>(wide[0], 0);
    }
    ptx::wgmma_wait<0>();
    m.release(stage);
#pragma unroll
    for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum[j][e] = fmaf(part[j][e], scale[e / 2], sum[j][e]);
  }
}

template <Dtype X, int M, int N, int Stages>
__device__ inline void multiply_tile(Multiplier<WidenedConfig<X, M, N, Stages>>& m,
                                     const Work<WidenedConfig<X, M, N, Stages>>& work,
                                     float (&sum)[1][WidenedConfig<X, M, N, Stages>::kTiles][4]) {
  if (work.p.a_dtype == Dtype::i8)
    multiply_widened<Dtype::i8>(m, work, sum[0]);
  else
    multiply_widened<Dtype::e4m3>(m, work, sum[0]);
}

template <Dtype X, int M, int N, int Stages>
__device__ inline void finish_tile(const Multiplier<WidenedConfig<X, M, N, Stages>>& m,
                                   const Work<WidenedConfig<X, M, N, Stages>>& work,
                                   const float (&sum)[1][WidenedConfig<X, M, N, Stages>::kTiles][4],
                                   typename WidenedConfig<X, M, N, Stages>::SharedStorage& s, const GemmOutput& o, int,
                                   int) {
  finish_transposed(sum, s.slab[threadIdx.x / 32], o, work.column, work.row + m.row, work.split);
}

// Memory binds: 112 KB of the weight on their way.
template <Dtype X>
using Tile128x16 = WidenedConfig<X, 128, 16, 8>;
template <Dtype X>
using Tile128x64 = WidenedConfig<X, 128, 64, 6>;
// 144 KB on their way while one stage is used. In clusters of two 32 bytes a clock from L2, of 39 that there are.
template <Dtype X>
using Tile128x128 = WidenedConfig<X, 128, 128, 4>;

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

}  // namespace forwardpass
