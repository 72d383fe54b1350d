#pragma once
// The main loop of 8-bit weights and 16-bit x on mma.sync m16n8k16: the 8-bit weight is upconverted in registers, x is
// used as it is. Swap-AB, as on wgmma and in the GEMV: the mma's first operand, the weight, is four consecutive
// registers, which upconversion fills without a move; the second is two, and a 16-byte load of x fills it twice. The
// other way round a third of all instructions were moves.
//
// Memory binds up to 64 rows, beyond that the tensor cores. Of 128 x 128 a warp has 64 x 32, so that no element of the
// weight is upconverted by more than two warps. For 128 mma, 1024 clocks of an A100, a warp issues 514 instructions
// (int8 to fp16), 662 (int8 to bf16), 737 (e4m3 to fp16) or 929 (e4m3 to bf16), and a scheduler has two warps: the last
// is nearly bound by issue. With the instruction for e4m3 (sm_90) they are 452 and 644. Static counts, nvcc 13.0, of a
// kernel for one of the two weight types.
#include "device/swizzled_rows.cuh"
#include "device/upconvert.cuh"
#include "kernels/gemm/mma.cuh"
#include "kernels/gemm/operand_copy.cuh"

namespace forwardpass {

// Types are branches in each stage, not kernels of their own, which have as many registers and are no faster: x is fp16
// or bf16, the weight int8 or e4m3.
struct W8a16 {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr bool kSwapAB = true, k16Bits = true, kPromoted = false, kBlockScaled = true;
};

// Its tiles; those of a warp are 16 or 64 x 32. Memory binds: three stages in flight, 48 KB of the weight, with one
// block per multiprocessor (an H100 needs 15 KB, see gemv_sm80.cu).
constexpr MmaTile kW8a16Of16Rows{
    .m = 16, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 4, .blocks_per_sm = 1};
constexpr MmaTile kW8a16Of64Rows{
    .m = 64, .n = 128, .warps_m = 1, .warps_n = 4, .stage_k = 128, .stages = 3, .blocks_per_sm = 1};

// A matrix of 16-bit elements as a matrix of bytes.
__device__ inline Matrix in_bytes(Matrix m) {
  m.columns *= 2, m.stride *= 2;
  return m;
}

// A stage is two slices of 64 of K: rows of 128 bytes of x, of 64 bytes of the weight. A lane loads its elements by 16
// bytes: 16 consecutive ones of the weight, and the same 16 of x in two loads. ldmatrix would give it elements of x and
// of the weight that do not belong together. Eight lanes read two rows of the weight, 128 contiguous bytes, and every
// second chunk of two rows of x, which the swizzle makes contiguous.
constexpr int kSliceX = 128, kSliceW = 64;  // bytes of a row in a slice
template <class Config>
struct SliceStages {
  static_assert(Config::kStageK == 2 * kSliceW);
  uint8_t x[2 * Config::kStages][Config::kM * kSliceX], w[2 * Config::kStages][Config::kN * kSliceW];
};

// A lane's offsets in a slice.
struct SliceOffset {
  int x[2], w;  // of x for each half of the slice; of the weight for both

  __device__ SliceOffset(int warp_m, int warp_n) {
#pragma unroll
    for (int half = 0; half < 2; ++half)
      x[half] = SwizzledRows<kSliceX>::offset(warp_m + group_id(), 2 * thread_in_group() + half);
    w = SwizzledRows<kSliceW>::offset(warp_n + group_id(), thread_in_group());
  }
};

// sum [weight's rows, x's rows] = weight x^T, of the slices in stage `stage`.
template <class Config, Dtype X, Dtype W>
__device__ inline void mma_stage(typename Config::Accumulators& sum, const SliceStages<Config>& s, int stage,
                                 const SliceOffset& from) {
  constexpr float kZeros[4] = {};
#pragma unroll
  for (int slice = 0; slice < 2; ++slice) {
    const uint8_t *x_rows = s.x[stage * 2 + slice], *w_rows = s.w[stage * 2 + slice] + from.w;
    uint4 weight[Config::kTilesN][2];  // of a tile, two rows that are eight apart
#pragma unroll
    for (int i = 0; i < 2 * Config::kTilesN; ++i)
      weight[i / 2][i % 2] = *reinterpret_cast<const uint4*>(w_rows + i * 8 * kSliceW);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint32_t upconverted[Config::kTilesN][2][4];
#pragma unroll
      for (int i = 0; i < Config::kTilesN; ++i)
#pragma unroll
        for (int step = 0; step < 2; ++step)
          upconvert_rows<W, X>(word(weight[i][0], half * 2 + step), word(weight[i][1], half * 2 + step),
                               upconverted[i][step]);
#pragma unroll
      for (int j = 0; j < Config::kTilesM; ++j) {
        const uint4 x = *reinterpret_cast<const uint4*>(x_rows + from.x[half] + j * 8 * kSliceX);
        const uint32_t columns[2][2] = {{x.x, x.y}, {x.z, x.w}};
#pragma unroll
        for (int i = 0; i < Config::kTilesN; ++i)
#pragma unroll
          for (int step = 0; step < 2; ++step) {
            if (slice == 0 && half == 0 && step == 0)
              ptx::mma_m16n8k16<X>(sum[i][j], upconverted[i][step], columns[step], kZeros);
            else
              ptx::mma_m16n8k16<X>(sum[i][j], upconverted[i][step], columns[step], sum[i][j]);
          }
      }
    }
  }
}

// Scales of this lane's rows of the weight, from `row` on, for block `block` of K.
template <int kTilesN>
__device__ inline void load_block_scales(float (&scale)[kTilesN][2], const GemmArguments& p, int64_t row,
                                         int64_t block) {
  const int64_t blocks = ceil_div(p.a.columns, kScaleBlock);
#pragma unroll
  for (int i = 0; i < 2 * kTilesN; ++i)
    scale[i / 2][i % 2] = p.blocks.b ? p.blocks.b[min(row + i * 8, p.b.rows - 1) * blocks + block] : 1.0f;
}

// Every 128 of K the partial accumulators are added to a second set, times the weight's scale of that block if it has
// block scales.
template <class Config>
struct UpconvertingMmaMainloop {
  using Stages = SliceStages<Config>;
  using Pipeline = typename Config::Pipeline;
  const GemmArguments& p;
  typename Config::SharedStorage& s;
  const int warp_m, warp_n;  // this warp's first row and column in the tile

  __device__ void operator()(const GemmTile& tile, typename Config::Accumulators& acc) const {
    OperandCopy<kSliceX, Config::kM, Config::kThreads> copy_x(in_bytes(p.a), tile.row, tile.k * 2, tile.k_end * 2,
                                                              s.stage.x[0]);
    OperandCopy<kSliceW, Config::kN, Config::kThreads> copy_w(p.b, tile.b_row, tile.k, tile.k_end, s.stage.w[0]);
    const SliceOffset from(warp_m, warp_n);
    const auto copy_next = [&](int stage) {  // zeros beyond K
#pragma unroll
      for (int slice = 0; slice < 2; ++slice) {
        copy_x.masked(stage * 2 + slice, slice), copy_w.masked(stage * 2 + slice, slice);
      }
      copy_x.advance(2), copy_w.advance(2);
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < Config::kStages - 1; ++i) copy_next(i);

    acc.clear();
    int stage = 0;
    const int64_t last_block = ceil_div(tile.k_end, kScaleBlock);
#pragma unroll 1
    for (int64_t block = tile.k / kScaleBlock; block < last_block; ++block) {
      Pipeline::wait();
      copy_next(Pipeline::before(stage));
      float scale[Config::kTilesN][2];
      load_block_scales(scale, p, tile.b_row + warp_n + group_id(), block);
      typename Config::Accumulators sum;
      if (p.a.dtype == Dtype::f16)
        multiply<Dtype::f16>(sum, stage, from);
      else
        multiply<Dtype::bf16>(sum, stage, from);
      acc.for_each([&](float& a, int i, int j, int e) { a = __fmaf_rn(sum[i][j][e], scale[i][e / 2], a); });
      stage = Pipeline::after(stage);
    }
    Pipeline::drain();
  }

 private:
  template <Dtype X>
  __device__ void multiply(typename Config::Accumulators& sum, int stage, const SliceOffset& from) const {
    if (p.b.dtype == Dtype::i8)
      mma_stage<Config, X, Dtype::i8>(sum, s.stage, stage, from);
    else
      mma_stage<Config, X, Dtype::e4m3>(sum, s.stage, stage, from);
  }
};

}  // namespace forwardpass
