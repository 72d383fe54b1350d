#pragma once
// GEMM on mma.sync: int8 from sm_80 on, e4m3 from sm_89 on. A block computes one tile of the output. Slices of kStageK
// of K come through a pipeline of stages in shared memory by cp.async; kStages - 1 of them are in flight while one is
// used.
//
// Tensor cores bind first, then issue. A warp's 64 x 64 x 32 takes 32 mma and 8 ldmatrix, 0.25 per mma; the copies of a
// stage of 64 of K are 8 per thread, 0.125 per mma. L2: (M + N) / (M N) bytes per multiply-add, so 128 x 128 needs 32
// bytes a clock for an A100's multiprocessor, which gets 47 (5120 a clock for 108).
#include "device/gemm_epilogue.cuh"
#include "device/gemm_operands.cuh"
#include "device/ptx_sm80.cuh"
#include "device/shared_bytes.cuh"
#include "schedule/tile_map.cuh"

namespace forwardpass {

// Blocks: how many share a multiprocessor; it limits the registers.
template <class Element_, int M, int N, int WarpsM, int WarpsN, int StageK, int Stages, int Blocks>
struct MmaConfig {
  using Element = Element_;
  using Acc = typename Element::Acc;
  static constexpr int kM = M, kN = N, kStageK = StageK, kStages = Stages, kBlocks = Blocks;
  static constexpr int kWarpsM = WarpsM, kWarpsN = WarpsN, kThreads = 32 * WarpsM * WarpsN;
  static constexpr int kWarpM = M / WarpsM, kWarpN = N / WarpsN;
  static constexpr int kRows = kWarpM / 16, kTiles = kWarpN / 8;  // of a warp: m16 tiles, n8 tiles
  static_assert(!Element::kPromoted || StageK == kScaleBlock, "promotion is once a stage");

  struct SharedStorage {
    union {
      struct {
        uint8_t a[kStages][kM * kStageK], b[kStages][kN * kStageK];
        float a_scale[kStages][Element::kBlockScaled ? kM : 4];
      } stage;
      Staging staging[kWarpsM * kWarpsN];
    };
  };
};

// The layout of an operand's rows in a stage: kStageK bytes each, 16-byte chunks swizzled so that the eight rows of a
// column of chunks, which an ldmatrix reads, fall into different banks; so do the 128 bytes that a quarter of a warp
// copies at a time.
template <class Config>
struct StageLayout {
  static constexpr int kRowBytes = Config::kStageK, kChunks = kRowBytes / 16;
  static_assert(kChunks == 4 || kChunks == 8);
  __device__ static int swizzle(int row) { return kChunks == 8 ? row % 8 : row / 2 % 4; }
  __device__ static int offset(int row, int chunk) { return row * kRowBytes + (chunk ^ swizzle(row)) * 16; }
};

// A thread's share in copying R rows of an operand, slice after slice: one chunk of every kStep-th row. Rows outside
// the matrix read its last row again, as their outputs are not stored; columns outside it are zero.
template <class Config, int R>
struct OperandCopy {
  using Layout = StageLayout<Config>;
  static constexpr int kStep = Config::kThreads / Layout::kChunks, kCount = R / kStep;
  static_assert(R % kStep == 0 && kStep % 8 == 0);
  const uint8_t* row[kCount];
  int left;  // bytes from this thread's chunk to the end of K, which is below 2^30
  uint32_t to;

  __device__ OperandCopy(const Matrix& m, int64_t first_row, int64_t k, int64_t k_end, uint8_t* stage) {
    const int chunk = threadIdx.x % Layout::kChunks, first = threadIdx.x / Layout::kChunks;
    left = static_cast<int>(k_end - k) - chunk * 16;
    to = ptx::shared_address(stage) + Layout::offset(first, chunk);
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const int64_t r = min(first_row + first + i * kStep, m.rows - 1);
      row[i] = static_cast<const uint8_t*>(m.data) + r * m.stride + k + chunk * 16;
    }
  }
  // Copies the slice that is `ahead` slices further, all of whose columns exist.
  __device__ void whole(int stage, int ahead) const {
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::cp_async_16(at(stage, i), row[i] + ahead * Config::kStageK);
  }
  // The same of a slice of which some or all columns may be outside.
  __device__ void masked(int stage, int ahead) const {
    const int size = min(max(left - ahead * Config::kStageK, 0), 16);
#pragma unroll
    for (int i = 0; i < kCount; ++i) ptx::cp_async_16(at(stage, i), row[i] + ahead * Config::kStageK, size);
  }
  __device__ void advance(int slices) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) row[i] += slices * Config::kStageK;
    left -= slices * Config::kStageK;
  }

 private:
  __device__ uint32_t at(int stage, int i) const {
    return to + stage * R * Config::kStageK + i * kStep * Layout::kRowBytes;
  }
};

// Block scales, one per 128 of K: those of a's rows are copied with each slice; b has one for all columns of a warp,
// two if gated.
template <class Config>
struct BlockScaleCopy {
  static_assert(!Config::Element::kBlockScaled || kScaleBlock % Config::kWarpN == 0,
                "a warp's columns lie in one block");
  const float *a, *b;
  int64_t a_stride, up_offset;
  uint32_t to;
  int size;

  __device__ BlockScaleCopy(const GemmParams& p, int64_t row, int64_t column, int64_t k, float* stage) {
    const int64_t block = k / kScaleBlock, k_blocks = (p.a.columns + kScaleBlock - 1) / kScaleBlock;
    const bool gated = is_gated(p.epilogue.activation);
    const int64_t first = row + threadIdx.x * 4, last_column = min(column, p.b.rows - 1);
    a = p.blocks.a + block * p.blocks.a_stride + first;
    a_stride = p.blocks.a_stride;
    b = p.blocks.b + (gated ? last_column / 2 : last_column) / kScaleBlock * k_blocks + block;
    up_offset = p.blocks.up_offset;  // 0 unless gated
    to = ptx::shared_address(stage) + threadIdx.x * 16;
    size = static_cast<int>(min(max(p.a.rows - first, int64_t{0}), int64_t{4})) * 4;
  }
  // Copies those of the next slice, if there is one (`inside`).
  __device__ void operator()(int stage, bool inside) {
    if (threadIdx.x < Config::kM / 4) ptx::cp_async_16(to + stage * Config::kM * 4, a, inside ? size : 0);
    a += a_stride;
  }
};

// A lane's addresses for an operand's ldmatrix: 16 rows x 32 bytes, for each 32 bytes of a stage's K.
template <class Config>
struct FragmentAddress {
  using Layout = StageLayout<Config>;
  static constexpr int kSteps = Config::kStageK / 32;
  uint32_t at[kSteps];

  // chunk: which 16 of the 32 bytes this lane's 8 x 8 matrix has
  __device__ FragmentAddress(const uint8_t* stage, int row, int chunk) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) at[k] = ptx::shared_address(stage) + Layout::offset(row, 2 * k + chunk);
  }
};

// The product of one slice of K in shared memory: acc += a b.
template <class Config>
struct SliceProduct {
  using Acc = typename Config::Acc;
  using Layout = StageLayout<Config>;
  using Address = FragmentAddress<Config>;
  static constexpr int kRows = Config::kRows, kTiles = Config::kTiles;
  const Address from_a, from_b;

  // a: the four 8 x 8 matrices of an ldmatrix are rows 0-7 and 8-15 of bytes 0-15, then of bytes 16-31; b: bytes 0-15
  // and 16-31 of one n8 tile, then of the next
  __device__ SliceProduct(typename Config::SharedStorage& s, int warp_m, int warp_n, int lane)
      : from_a(s.stage.a[0], warp_m + lane % 16, lane / 16),
        from_b(s.stage.b[0], warp_n + lane % 8 + lane / 16 * 8, lane / 8 % 2) {}

  // promote(stage, partial accumulators of this slice), for elements that need it
  template <class Promote>
  __device__ void operator()(int stage, Acc (&acc)[kRows][kTiles][4], Promote promote) const {
    if constexpr (Config::Element::kPromoted) {
      Acc partial[kRows][kTiles][4];
      mma<true>(stage, partial);
      promote(stage, partial);
    } else {
      mma<false>(stage, acc);
    }
  }

 private:
  // from_zero: acc is not read
  template <bool from_zero>
  __device__ void mma(int stage, Acc (&acc)[kRows][kTiles][4]) const {
    constexpr Acc kZeros[4] = {};
#pragma unroll
    for (int step = 0; step < Address::kSteps; ++step) {
      uint32_t a[kRows][4], b[kTiles][2];
#pragma unroll
      for (int i = 0; i < kRows; ++i)
        ptx::ldmatrix_x4(a[i], from_a.at[step] + stage * Config::kM * Config::kStageK + i * 16 * Layout::kRowBytes);
#pragma unroll
      for (int j = 0; j < kTiles; j += 2)
        ptx::ldmatrix_x4(reinterpret_cast<uint32_t (&)[4]>(b[j]),
                         from_b.at[step] + stage * Config::kN * Config::kStageK + j * 8 * Layout::kRowBytes);
#pragma unroll
      for (int i = 0; i < kRows; ++i)
#pragma unroll
        for (int j = 0; j < kTiles; ++j) {
          if (from_zero && step == 0) {
            ptx::mma_m16n8k32(acc[i][j], a[i], b[j], kZeros);
          } else {
            ptx::mma_m16n8k32(acc[i][j], a[i], b[j], acc[i][j]);
          }
        }
    }
  }
};

template <class Config, class = SharedBytesOf<Config>>
__global__ void __launch_bounds__(Config::kThreads, Config::kBlocks)
    gemm_mma_kernel(GemmParams p, TileMap map, GemmOutput out) {
  using Acc = typename Config::Acc;
  constexpr int kRows = Config::kRows, kTiles = Config::kTiles, kStages = Config::kStages;
  extern __shared__ __align__(128) uint8_t shared[];
  auto& s = *reinterpret_cast<typename Config::SharedStorage*>(shared);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int warp_m = warp % Config::kWarpsM * Config::kWarpM, warp_n = warp / Config::kWarpsM * Config::kWarpN;
  const TileMap::Tile tile = map.at(blockIdx.x);
  const int64_t row = tile.m * Config::kM, column = tile.n * Config::kN;
  const int64_t k = tile.split * p.choice.split_k, k_end = min(k + p.choice.split_k, p.a.columns);
  const int whole = static_cast<int>((k_end - k) / Config::kStageK),
            slices = static_cast<int>((k_end - k + Config::kStageK - 1) / Config::kStageK);

  OperandCopy<Config, Config::kM> copy_a(p.a, row, k, k_end, s.stage.a[0]);
  OperandCopy<Config, Config::kN> copy_b(p.b, column, k, k_end, s.stage.b[0]);
  const SliceProduct<Config> product(s, warp_m, warp_n, lane);
  BlockScaleCopy<Config> scales(p, row, column + warp_n, k, s.stage.a_scale[0]);
  const auto copy_masked = [&](int stage, int ahead, int slice) {
    if constexpr (Config::Element::kBlockScaled) scales(stage, slice < slices);
    copy_a.masked(stage, ahead), copy_b.masked(stage, ahead);
    ptx::cp_async_commit();
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) copy_masked(i, i, i);
  copy_a.advance(kStages - 1), copy_b.advance(kStages - 1);

  Acc acc[kRows][kTiles][4] = {};
  const auto promote = [&](int stage, const auto& partial) {
    float b_scale[2] = {1, 1};
    if constexpr (Config::Element::kBlockScaled) b_scale[0] = scales.b[0], b_scale[1] = scales.b[scales.up_offset];
    ++scales.b;
#pragma unroll
    for (int i = 0; i < kRows; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float a_scale = 1;
        if constexpr (Config::Element::kBlockScaled)
          a_scale = s.stage.a_scale[stage][warp_m + i * 16 + half * 8 + lane / 4];
        const float scale[2] = {a_scale * b_scale[0], a_scale * b_scale[1]};
#pragma unroll
        for (int j = 0; j < kTiles; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e)
            acc[i][j][e] = fmaf(partial[i][j][e], scale[j % 2], acc[i][j][e]);
      }
  };
  // The slice in `stage` has arrived for all warps, and all have read the one before, whose stage is filled next.
  const auto wait = [] {
    ptx::cp_async_wait<kStages - 2>();
    __syncthreads();
  };

  // The steady part of the main loop, in which all copies are of whole slices, in rounds of kStages, so that stages and
  // columns are constants. With promotion, an exit after each slice keeps the assembler from interleaving neighbouring
  // slices, for which it lacks the registers (a branch that is never taken does not help: 8 to 140 bytes of spills).
  constexpr bool kExits = Config::Element::kPromoted;
  const int steady = max(whole - kStages + 1, 0);
  const auto round = [&](int left) {
#pragma unroll
    for (int i = 0; i < kStages; ++i) {
      const int next = (i + kStages - 1) % kStages;
      wait();
      if constexpr (Config::Element::kBlockScaled) scales(next, true);
      copy_a.whole(next, i), copy_b.whole(next, i);
      ptx::cp_async_commit();
      product(i, acc, promote);
      if (kExits && left == i + 1) return;
    }
    copy_a.advance(kStages), copy_b.advance(kStages);
  };
#pragma unroll 1
  for (int left = steady; left >= (kExits ? 1 : kStages); left -= kStages) round(left);

  int slice = kExits ? steady : steady - steady % kStages, stage = slice % kStages;
  // Computed anew: addresses that both loops share would be moved between registers in the first one, 708 instead of
  // 687 instructions for 2^20 MAC of e4m3.
  const int next_k = k + (slice + kStages - 1) * Config::kStageK;
  copy_a = OperandCopy<Config, Config::kM>(p.a, row, next_k, k_end, s.stage.a[0]);
  copy_b = OperandCopy<Config, Config::kN>(p.b, column, next_k, k_end, s.stage.b[0]);
#pragma unroll 1
  for (int ahead = 0; slice < slices; ++slice, ++ahead) {
    wait();
    copy_masked(stage == 0 ? kStages - 1 : stage - 1, ahead, slice + kStages - 1);
    product(stage, acc, promote);
    stage = stage == kStages - 1 ? 0 : stage + 1;
  }
  ptx::cp_async_wait<0>();
  __syncthreads();
  finish_fragments(acc, s.staging[warp], out, row + warp_m, column + warp_n, tile.split);
}

template <class Config>
cudaError_t launch_gemm_mma(const GemmParams& p, cudaStream_t stream) {
  constexpr int kShared = sizeof(typename Config::SharedStorage);
  const TileMap map{ceil_div(p.a.rows, Config::kM), ceil_div(p.b.rows, Config::kN)};
  if (auto e = allow_shared<gemm_mma_kernel<Config>>(kShared)) return e;
  auto kernel = gemm_mma_kernel<Config>;
  kernel<<<static_cast<unsigned>(map.blocks(p.choice.splits)), Config::kThreads, kShared, stream>>>(p, map,
                                                                                                    GemmOutput(p));
  if (auto e = cudaGetLastError()) return e;
  return reduce_split_k(p, Config::Element::kAcc, stream);
}

}  // namespace forwardpass
