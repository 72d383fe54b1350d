// w8a16_gemm on mma.sync m16n8k16: the 8-bit weight is upconverted in registers, x is used as it is. Swap-AB, as on
// wgmma and in the GEMV: the mma's first operand, the weight, is four consecutive registers, which upconversion fills
// without a move; the second is two, and a 16-byte load of x fills it twice. The other way round a third of all
// instructions were moves.
//
// Memory binds up to 64 rows, beyond that the tensor cores. Of 128 x 128 a warp has 64 x 32, so that no element of the
// weight is upconverted by more than two warps. For 128 mma, 1024 clocks of an A100, a warp issues 514 instructions
// (int8 to fp16), 662 (int8 to bf16), 737 (e4m3 to fp16) or 929 (e4m3 to bf16), and a scheduler has two warps: the last
// is nearly bound by issue. With the instruction for e4m3 (sm_90) they are 452 and 644. Static counts, nvcc 13.0, of a
// kernel for one of the two weight types.
#include "device/dispatch.h"
#include "device/gemm_sm80.cuh"
#include "device/upconvert.cuh"
#include "kernels/gemm.h"
#include "params/w8a16_gemm.h"

namespace forwardpass {

// A stage is two slices of 64 of K: rows of 128 bytes of x, of 64 bytes of the weight. A lane loads its elements by 16
// bytes: 16 consecutive ones of the weight, and the same 16 of x in two loads. ldmatrix would give it elements of x and
// of the weight that do not belong together. Eight lanes read two rows of the weight, 128 contiguous bytes, and every
// second chunk of two rows of x, which the swizzle makes contiguous.
//
// Every 128 of K the partial accumulators are added to a second set, times the weight's scale of that block if it has
// block scales.
template <Dtype X_, int M, int N, int Stages, int Blocks>
struct W8a16Config {
  static constexpr Dtype X = X_;
  static constexpr int kM = M, kN = N, kStages = Stages, kBlocks = Blocks;
  static constexpr int kWarpN = 32, kWarpM = M < 64 ? M : 64, kWarpsN = N / kWarpN, kWarpsM = M / kWarpM;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kTilesN = kWarpN / 16,
                       kTilesM = kWarpM / 8;  // of a warp: m16 tiles of the weight's rows, n8 tiles of x's

  // The layout of a slice, for OperandCopy: kStageK is in bytes.
  struct A {
    static constexpr int kThreads = W8a16Config::kThreads, kStageK = 128;
  };
  struct B {
    static constexpr int kThreads = W8a16Config::kThreads, kStageK = 64;
  };
  struct SharedStorage {
    union {
      struct {
        uint8_t a[2 * kStages][kM * A::kStageK], b[2 * kStages][kN * B::kStageK];
      } slice;
      Staging staging[kWarps];
    };
  };
};

// A matrix of 16-bit elements as a matrix of bytes.
__device__ inline Matrix in_bytes(Matrix m) {
  m.columns *= 2, m.stride *= 2;
  return m;
}

// A lane's offsets in a slice.
template <class Config>
struct FragmentOffset {
  int a[2], b;  // a: x, for each half of the slice; b: the weight, for both

  __device__ FragmentOffset(int warp_m, int warp_n) {
    const int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
#pragma unroll
    for (int half = 0; half < 2; ++half) a[half] = StageLayout<typename Config::A>::offset(warp_m + g, 2 * t + half);
    b = StageLayout<typename Config::B>::offset(warp_n + g, t);
  }
};

template <class Config>
using Fragments = float[Config::kTilesN][Config::kTilesM][4];

// sum [weight's rows, x's rows] = weight x^T, of the slices in stage `stage`.
template <class Config, Dtype W>
__device__ inline void mma_stage(Fragments<Config>& sum, const typename Config::SharedStorage& s, int stage,
                                 const FragmentOffset<Config>& from) {
  constexpr float kZeros[4] = {};
#pragma unroll
  for (int slice = 0; slice < 2; ++slice) {
    const uint8_t *a = s.slice.a[stage * 2 + slice], *b = s.slice.b[stage * 2 + slice] + from.b;
    uint4 weight[Config::kTilesN][2];  // rows g and g + 8
#pragma unroll
    for (int i = 0; i < 2 * Config::kTilesN; ++i)
      weight[i / 2][i % 2] = *reinterpret_cast<const uint4*>(b + i * 8 * Config::B::kStageK);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t wide[Config::kTilesN][2][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesN; ++i)
#pragma unroll
        for (int step = 0; step < 2; ++step)
          upconvert_rows<W, Config::X>(word(weight[i][0], half * 2 + step), word(weight[i][1], half * 2 + step),
                                       wide[i][step]);
#pragma unroll
      for (int j = 0; j < Config::kTilesM; ++j) {
        const uint4 x = *reinterpret_cast<const uint4*>(a + from.a[half] + j * 8 * Config::A::kStageK);
        const uint32_t columns[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
        for (int i = 0; i < Config::kTilesN; ++i)
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            if (slice == 0 && half == 0 && step == 0)
              ptx::mma_m16n8k16<Config::X>(sum[i][j], wide[i][step], columns[step], kZeros);
            else
              ptx::mma_m16n8k16<Config::X>(sum[i][j], wide[i][step], columns[step], sum[i][j]);
          }
      }
    }
  }
}

// Scales of this lane's rows of the weight, from `row` on, for block `block` of K.
template <int kTilesN>
__device__ inline void load_block_scales(float (&scale)[kTilesN][2], const GemmParams& p, int64_t row, int64_t block) {
  const int64_t blocks = ceil_div(p.a.columns, kScaleBlock);
#pragma unroll
  for (int i = 0; i < 2 * kTilesN; ++i)
    scale[i / 2][i % 2] = p.blocks.b ? p.blocks.b[min(row + i * 8, p.b.rows - 1) * blocks + block] : 1.0f;
}

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    w8a16_gemm_kernel(GemmParams p, TileMap map, GemmOutput out) {
  extern __shared__ __align__(128) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Config::kWarpsM * Config::kWarpM, warp_n = warp / Config::kWarpsM * Config::kWarpN;
  const TileMap::Tile tile = map.at(blockIdx.x);
  const int64_t row = tile.m * Config::kM, column = tile.n * Config::kN;
  const int64_t k = tile.split * p.choice.split_k, k_end = min(k + p.choice.split_k, p.a.columns),
                last_block = ceil_div(k_end, kScaleBlock);

  OperandCopy<typename Config::A, Config::kM> copy_a(in_bytes(p.a), row, k * 2, k_end * 2, s.slice.a[0]);
  OperandCopy<typename Config::B, Config::kN> copy_b(p.b, column, k, k_end, s.slice.b[0]);
  const FragmentOffset<Config> from(warp_m, warp_n);
  const auto copy_next = [&](int stage) {  // zeros beyond K
#pragma unroll
    for (int slice = 0; slice < 2; ++slice) {
      copy_a.masked(stage * 2 + slice, slice), copy_b.masked(stage * 2 + slice, slice);
    }
    copy_a.advance(2), copy_b.advance(2);
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < Config::kStages - 1; ++i) copy_next(i);

  Fragments<Config> acc = {};
  int stage = 0;
#pragma unroll 1
  for (int64_t block = k / kScaleBlock; block < last_block; ++block) {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();  // this stage has arrived for all warps, and all have read the one before, which is filled next
    copy_next(stage == 0 ? Config::kStages - 1 : stage - 1);
    float scale[Config::kTilesN][2];
    load_block_scales(scale, p, column + warp_n + lane / 4, block);
    Fragments<Config> sum;
    if (p.b.dtype == Dtype::i8)
      mma_stage<Config, Dtype::i8>(sum, s, stage, from);
    else
      mma_stage<Config, Dtype::e4m3>(sum, s, stage, from);
#pragma unroll
    for (int i = 0; i < Config::kTilesN; ++i)
#pragma unroll
      for (int j = 0; j < Config::kTilesM; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) acc[i][j][e] = __fmaf_rn(sum[i][j][e], scale[i][e / 2], acc[i][j][e]);
    stage = stage == Config::kStages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  finish_transposed(acc, s.staging[warp], out, row + warp_m, column + warp_n, tile.split);
}

template <class Config>
cudaError_t launch(const GemmParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const TileMap map{ceil_div(p.a.rows, Config::kM), ceil_div(p.b.rows, Config::kN)};
  auto kernel = w8a16_gemm_kernel<Config>;
  if (auto e = allow_shared<w8a16_gemm_kernel<Config>>(kShared)) return e;
  kernel<<<static_cast<unsigned>(map.blocks(p.choice.splits)), Config::kThreads, kShared, stream>>>(p, map,
                                                                                                    GemmOutput(p));
  if (auto e = cudaGetLastError()) return e;
  return reduce_split_k(p, Dtype::f32, stream);
}

// Memory binds: three stages in flight, 48 KB of the weight, with one block per multiprocessor (an H100 needs 15 KB,
// see gemv_sm80.cuh).
template <Dtype X>
using Tile16x128 = W8a16Config<X, 16, 128, 4, 1>;
template <Dtype X>
using Tile64x128 = W8a16Config<X, 64, 128, 3, 1>;
// Two stages are 96 KB, all that an L40S has: one is used, for 2048 clocks of an A100, while the other arrives. Two
// sets of accumulators are 128 registers, so eight warps per multiprocessor.
template <Dtype X>
using Tile128x128 = W8a16Config<X, 128, 128, 2, 1>;

namespace {

template <template <Dtype> class Tile>
cudaError_t launch_tile(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) { return launch<Tile<X()>>(p, stream); });
}
template <template <Dtype> class Tile>
constexpr GemmKernel row() {
  return {.arch = sm_80, .tile_m = Tile<Dtype::f16>::kM, .tile_n = Tile<Dtype::f16>::kN, .launch = launch_tile<Tile>};
}
const GemmKernel kernels[] = {row<Tile128x128>(), row<Tile64x128>(), row<Tile16x128>()};
const GemmKernels<W8a16GemmParams> registered(kernels);

}  // namespace
}  // namespace forwardpass
