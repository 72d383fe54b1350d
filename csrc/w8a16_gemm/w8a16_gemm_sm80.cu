// w8a16_gemm on mma.sync m16n8k16: x as it is, the 8-bit weight widened in registers; up to four rows by the GEMV.
//
// What binds: memory, up to 64 rows. Beyond, tensor cores: of 128 x 128 a warp has 64 x 32, so that no number of the
// weight is widened by more than two warps. For each mma of 64 rows int8 takes 0.6 (fp16) or 1 instruction to widen,
// e4m3 0.25 or 1 (sm_80: 1.8, 2.5), where an A100 issues 8.
#include "common/dispatch.h"
#include "common/gemm_sm80.cuh"
#include "common/gemv_sm80.cuh"
#include "w8a16_gemm/w8a16_gemm.h"

namespace forwardpass {

// A stage is 64 of K: rows of 128 bytes of x, of 64 of the weight. A lane takes what it needs by 16 bytes, not by
// ldmatrix, which would give it numbers of x and of the weight that do not belong together: of the weight 16
// consecutive ones, of x the same 16 in two loads. Two rows of the weight are what eight lanes read, 128 bytes in a
// row; of x they read every second chunk of two rows, which the swizzle puts side by side.
//
// Sums go to a second accumulator every 128 of K, times the weight's scale there, if it has such scales.
template <Dtype X_, int M, int N, int Stages, int Blocks>
struct W8a16Config {
  static constexpr Dtype X = X_;
  static constexpr int kM = M, kN = N, kStages = Stages, kBlocks = Blocks, kStageK = 64;
  static constexpr int kWarpN = 32, kWarpM = M < 64 ? M : 64, kWarpsN = N / kWarpN, kWarpsM = M / kWarpM;
  static constexpr int kWarps = kWarpsM * kWarpsN, kThreads = 32 * kWarps;
  static constexpr int kRows = kWarpM / 16, kTiles = kWarpN / 8;  // of a warp: blocks of 16 rows, n8 tiles

  // For OperandCopy, which counts bytes.
  struct A {
    static constexpr int kThreads = W8a16Config::kThreads, kStageK = 128;
  };
  struct B {
    static constexpr int kThreads = W8a16Config::kThreads, kStageK = 64;
  };
  struct SharedStorage {
    union {
      struct {
        uint8_t a[kStages][kM * A::kStageK], b[kStages][kN * B::kStageK];
      } stage;
      Slab slab[kWarps];
    };
  };
};

// A matrix of 16-bit numbers as one of bytes.
__device__ inline Matrix in_bytes(Matrix m) {
  m.columns *= 2, m.stride *= 2;
  return m;
}

// sum [kRows x 16, kTiles x 8] += a stage of x times one of the weight, both from where this lane's part begins.
template <class Config, Dtype W>
__device__ inline void multiply_stage(float (&sum)[Config::kRows][Config::kTiles][4], const uint8_t* a,
                                      const uint8_t* b) {
  uint4 weight[Config::kTiles];
#pragma unroll
  for (int j = 0; j < Config::kTiles; ++j) weight[j] = *reinterpret_cast<const uint4*>(b + j * 8 * Config::B::kStageK);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    uint32_t wide[Config::kTiles][2][2];
#pragma unroll
    for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
      for (int step = 0; step < 2; ++step) widen<W, Config::X>(word(weight[j], half * 2 + step), wide[j][step]);
    const auto from = reinterpret_cast<const uint8_t*>(reinterpret_cast<uintptr_t>(a) ^ half * 16);
#pragma unroll
    for (int i = 0; i < Config::kRows; ++i) {
      const uint4 x = *reinterpret_cast<const uint4*>(from + i * 16 * Config::A::kStageK),
                  below = *reinterpret_cast<const uint4*>(from + (i * 16 + 8) * Config::A::kStageK);
      const uint32_t rows[2][4] = {{x.x, below.x, x.y, below.y}, {x.z, below.z, x.w, below.w}};
#pragma unroll
      for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
        for (int step = 0; step < 2; ++step) ptx::mma_m16n8k16<Config::X>(sum[i][j], rows[step], wide[j][step]);
    }
  }
}

// The scales of this lane's columns for block `block` of K.
template <int kTiles>
__device__ inline void load_block_scales(float (&scale)[kTiles][2], const GemmParams& p, int64_t column,
                                         int64_t block) {
  const int64_t blocks = ceil_div(p.a.columns, kScaleBlock);
#pragma unroll
  for (int j = 0; j < kTiles; ++j)
#pragma unroll
    for (int e = 0; e < 2; ++e)
      scale[j][e] = p.blocks.b ? p.blocks.b[min(column + j * 8 + e, p.b.rows - 1) * blocks + block] : 1.0f;
}

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    w8a16_gemm_kernel(GemmParams p, TileMap map, GemmOutput out) {
  extern __shared__ __align__(128) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int warp_m = warp % Config::kWarpsM * Config::kWarpM, warp_n = warp / Config::kWarpsM * Config::kWarpN;
  const TileMap::Tile tile = map.at(blockIdx.x);
  const int64_t row = tile.m * Config::kM, column = tile.n * Config::kN;
  const int64_t k = tile.split * p.plan.split_k, k_end = min(k + p.plan.split_k, p.a.columns);
  const int slices = static_cast<int>((k_end - k + Config::kStageK - 1) / Config::kStageK);

  OperandCopy<typename Config::A, Config::kM> copy_a(in_bytes(p.a), row, k * 2, k_end * 2, s.stage.a[0]);
  OperandCopy<typename Config::B, Config::kN> copy_b(p.b, column, k, k_end, s.stage.b[0]);
  const uint8_t* from_a = s.stage.a[0] + StageLayout<typename Config::A>::offset(warp_m + g, 2 * t);
  const uint8_t* from_b = s.stage.b[0] + StageLayout<typename Config::B>::offset(warp_n + g, t);

  const auto copy_next = [&](int stage) {  // slices beyond the depth are zeros
    copy_a.masked(stage), copy_b.masked(stage);
    copy_a.advance(1), copy_b.advance(1);
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < Config::kStages - 1; ++i) copy_next(i);

  float acc[Config::kRows][Config::kTiles][4] = {}, sum[Config::kRows][Config::kTiles][4] = {};
  float scale[Config::kTiles][2];
  int stage = 0;
#pragma unroll 1
  for (int slice = 0; slice < slices; ++slice) {
    ptx::cp_async_wait<Config::kStages - 2>();
    __syncthreads();  // this slice is there for all warps, and all have read the one before, whose place is filled next
    copy_next(stage == 0 ? Config::kStages - 1 : stage - 1);
    const bool first = slice % 2 == 0, last = !first || slice == slices - 1;  // of 128 of K
    if (first) load_block_scales(scale, p, column + warp_n + t * 2, k / kScaleBlock + slice / 2);
    const uint8_t *a = from_a + stage * sizeof s.stage.a[0], *b = from_b + stage * sizeof s.stage.b[0];
    if (p.b.dtype == Dtype::i8)
      multiply_stage<Config, Dtype::i8>(sum, a, b);
    else
      multiply_stage<Config, Dtype::e4m3>(sum, a, b);
    if (last) {
#pragma unroll
      for (int i = 0; i < Config::kRows; ++i)
#pragma unroll
        for (int j = 0; j < Config::kTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            acc[i][j][e] = __fmaf_rn(sum[i][j][e], scale[j][e % 2], acc[i][j][e]);
            sum[i][j][e] = 0;
          }
    }
    stage = stage == Config::kStages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  finish_fragments(acc, s.slab[warp], out, row + warp_m, column + warp_n, tile.split);
}

template <class Config>
int launch(const GemmParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const TileMap map{ceil_div(p.a.rows, Config::kM), ceil_div(p.b.rows, Config::kN)};
  auto kernel = w8a16_gemm_kernel<Config>;
  if (auto e = allow_shared<w8a16_gemm_kernel<Config>>(kShared)) return e;
  kernel<<<static_cast<unsigned>(map.blocks(p.plan.splits)), Config::kThreads, kShared, stream>>>(p, map,
                                                                                                  GemmOutput(p));
  if (auto e = cudaGetLastError()) return e;
  return finish_splits(p, Dtype::f32, stream);
}

// Memory binds: five stages on their way, 40 KB of the weight, with one block a multiprocessor (an H100 needs 15 KB,
// see gemv_sm80.cuh).
template <Dtype X>
using Tile16x128 = W8a16Config<X, 16, 128, 6, 1>;
template <Dtype X>
using Tile64x128 = W8a16Config<X, 64, 128, 4, 1>;
// Four stages are 96 KB, all that an L40S has; two accumulators are 128 registers, so eight warps a multiprocessor.
template <Dtype X>
using Tile128x128 = W8a16Config<X, 128, 128, 4, 1>;

}  // namespace forwardpass

int forwardpass_w8a16_gemm(const forwardpass::W8a16GemmParams* p, void* stream) {
  using namespace forwardpass;
  const auto s = static_cast<cudaStream_t>(stream);
  int error = cudaErrorInvalidValue;
  dispatch<Dtype::f16, Dtype::bf16>(p->a.dtype, [&](auto X) {
    if (p->plan.path == GemmPlan::Path::gemv)
      error = launch_gemv<X()>(*p, s);
    else if (p->plan.tile_m == 16)
      error = launch<Tile16x128<X()>>(*p, s);
    else if (p->plan.tile_m == 64)
      error = launch<Tile64x128<X()>>(*p, s);
    else
      error = launch<Tile128x128<X()>>(*p, s);
  });
  return error;
}
