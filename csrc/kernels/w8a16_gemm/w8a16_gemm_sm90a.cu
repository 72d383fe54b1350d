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
#include "device/swizzled_rows.cuh"
#include "device/upconvert.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

// a: the 8-bit weight, upconverted to X; b: x.
template <Dtype X_>
struct Upconverted {
  static constexpr Dtype X = X_;
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = size_of(X);
  static constexpr bool kSwapAB = true, kPromoted = false;
};

// Every 128 of K the partial accumulators are added to a second set, times the weight's scale of that block if it has
// block scales. One half of a stage is upconverted while the wgmmas of the other half run.
template <class Config>
struct UpconvertingMainloop {
  static_assert(Config::kTilesM == 1);
  static constexpr Dtype X = Config::Element::X;
  static constexpr int kHalf = Config::kStageK / 2, kSteps = kHalf / 16;
  using Operand = uint32_t[kSteps][4];  // the first one of half a stage's wgmmas
  const WgmmaArguments& p;
  ConsumerPipeline<Config> pipeline;
  int row;          // this thread's first in the tile
  uint32_t weight;  // address of this lane's first two elements in the first stage
  uint32_t x;       // low half of x's descriptor in the first stage

  __device__ UpconvertingMainloop(const WgmmaArguments& p, typename Config::SharedStorage& s,
                                  const ConsumerPlace<Config>& place)
      : p(p), pipeline(p.map, s), row(place.row + accumulator_row(0)) {
    const int chunk = SwizzledRows<Config::kStageK>::swizzle(group_id());
    weight = uniform(ptx::shared_address(&s.stage[0].a[row][chunk * 16 + accumulator_column(0)]), threadIdx.x % 32);
    x = uniform(ptx::descriptor(ptx::shared_address(s.stage[0].b)));
  }

  template <class F>
  __device__ void operator()(const GemmTile& tile, typename Config::Accumulators& acc, F begin_epilogue) {
    begin_epilogue();
    if (p.a_dtype == Dtype::i8)
      multiply<Dtype::i8>(tile, acc);
    else
      multiply<Dtype::e4m3>(tile, acc);
  }

 private:
  template <Dtype W>
  __device__ void upconvert_half(Operand& upconverted, int half) const {
    // The first operand's registers: two columns, of this row and of the row eight below; then eight columns further.
    constexpr int kBelow = 8 * Config::kStageK, kFurther = 8;
    const uint32_t first = weight + pipeline.stage * sizeof(typename Config::Stage);
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const uint32_t from = first ^ (half * kSteps + step) * 16;  // the swizzle of TMA
      upconverted[step][0] = upconvert<W, X>(ptx::load_shared_16<0>(from));
      upconverted[step][1] = upconvert<W, X>(ptx::load_shared_16<kBelow>(from));
      upconverted[step][2] = upconvert<W, X>(ptx::load_shared_16<kFurther>(from));
      upconverted[step][3] = upconvert<W, X>(ptx::load_shared_16<kBelow + kFurther>(from));
    }
  }
  // One group of wgmmas: all rows of x by half a stage.
  __device__ void mma(typename Config::Accumulators::Row& acc, const Operand& upconverted, int half, int stage) const {
    constexpr int kBoxUnits = sizeof(Config::Stage::b[0]) / ptx::kDescriptorUnit;
    const uint32_t from = x + stage * Config::kStageUnits + half * kBoxUnits;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step)
      ptx::wgmma_k16<X>(acc, upconverted[step], from + step * 32 / ptx::kDescriptorUnit, half > 0 || step > 0);
    ptx::wgmma_commit();
  }
  template <Dtype W>
  __device__ void multiply(const GemmTile& tile, typename Config::Accumulators& acc) {
    const int64_t blocks = ceil_div(p.map.k, kScaleBlock), first = tile.row + row;
    const float* scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      scales[i] =
          p.row_scale ? p.row_scale + min(first + i * 8, p.out.columns - 1) * blocks + tile.k / kScaleBlock : nullptr;
    acc.clear();
    Operand upconverted[2];
    pipeline.wait_full();
    upconvert_half<W>(upconverted[0], 0);
    const int slices = tile.slices(Config::kStageK);
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      const int stage = pipeline.stage;
      typename Config::Accumulators::Row partial;
      mma(partial, upconverted[0], 0, stage);
      upconvert_half<W>(upconverted[1], 1);
      mma(partial, upconverted[1], 1, stage);
      const float scale[2] = {scales[0] ? scales[0][i] : 1, scales[1] ? scales[1][i] : 1};
      pipeline.advance();
      if (i + 1 < slices) {
        pipeline.wait_full();
        ptx::wgmma_wait<1>();
        upconvert_half<W>(upconverted[0], 0);
      }
      ptx::wgmma_wait<0>();
      pipeline.release(stage);
#pragma unroll
      for (int j = 0; j < Config::kTilesN; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[0][j][e] = fmaf(partial[j][e], scale[e / 2], acc[0][j][e]);
    }
  }
};

template <Dtype X, WgmmaTile kTile>
using UpconvertedConfig = WgmmaConfig<Upconverted<X>, kTile, UpconvertingMainloop>;

// Memory binds: 112 KB of the weight are in flight.
template <Dtype X>
using Tile128x16 = UpconvertedConfig<X, WgmmaTile{.m = 128, .n = 16, .consumers_m = 2, .stages = 8}>;
template <Dtype X>
using Tile128x64 = UpconvertedConfig<X, WgmmaTile{.m = 128, .n = 64, .consumers_m = 2, .stages = 6}>;
// 144 KB are in flight while one stage is used. In clusters of two a block reads 32 bytes a clock from L2, of about 39
// that are available.
template <Dtype X>
using Tile128x128 = UpconvertedConfig<X, WgmmaTile{.m = 128, .n = 128, .consumers_m = 2, .stages = 4}>;

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
          .cluster_sums = Tile<Dtype::f16>::kClusterSums,
          .launch = launch<Tile>,
          .resident_clusters = resident_clusters<Tile<Dtype::f16>>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile128x64>(), row<Tile128x16>()};
const GemmKernels<W8a16GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
