#pragma once
// The main loop of int8 and e4m3 on mma.sync.
//
// Tensor cores bind first, then issue. A warp's 64 x 64 x 32 takes 32 mma and 8 ldmatrix, 0.25 per mma; the copies of a
// stage of 64 of K are 8 per thread, 0.125 per mma. L2: (M + N) / (M N) bytes per multiply-add, so 128 x 128 needs 32
// bytes a clock for an A100's multiprocessor, which gets 47 (5120 a clock for 108).
#include "device/swizzled_rows.cuh"
#include "kernels/gemm/mma.cuh"
#include "kernels/gemm/operand_copy.cuh"

namespace forwardpass {

// What block scales are where there are none (E4m3OptionalBlocks).
static __device__ const float kOne = 1;

// Block scales, one per 128 of K: those of a's rows are copied with each slice; b has one for all columns of a warp,
// two if gated.
template <class Config>
struct BlockScaleCopy {
  static_assert(!Config::Element::kBlockScaled || kScaleBlock % Config::kWarpN == 0,
                "a warp's columns lie in one block");
  // Rows that a thread copies the scales of, at once where they begin at a multiple.
  static constexpr bool kAligned = Config::Schedule::kAlignedRows;
  static constexpr int kRows = kAligned ? 4 : 1;
  const float *a, *b;
  int64_t a_stride, up_offset;
  uint32_t to;
  int size, b_stride = 1;

  // warp_n: this warp's first column in the tile
  template <class Tile>
  __device__ BlockScaleCopy(const GemmArguments& p, const Tile& tile, int warp_n, float* stage) {
    const int64_t block = tile.k / kScaleBlock, k_blocks = (p.a.columns + kScaleBlock - 1) / kScaleBlock;
    const int64_t first = tile.row + threadIdx.x * kRows, last_column = min(tile.column + warp_n, p.out.columns - 1);
    a = p.blocks.a + block * p.blocks.a_stride + first;
    a_stride = p.blocks.a_stride;
    b = p.blocks.b + (p.gated() ? last_column / 2 : last_column) / kScaleBlock * k_blocks + block;
    b += tile.expert * block_scales_of(p.blocks, p.gated(), p.out.columns, p.a.columns);
    if constexpr (Config::Element::kOptionalBlocks)
      if (!p.blocks.a) a = b = &kOne, a_stride = b_stride = 0;
    up_offset = p.blocks.up_offset;  // 0 unless gated
    to = ptx::shared_address(stage) + threadIdx.x * kRows * 4;
    size = static_cast<int>(min(max(p.a.rows - first, int64_t{0}), int64_t{kRows})) * 4;
  }
  // Copies those of the next slice, if there is one (`inside`).
  __device__ void operator()(int stage, bool inside) {
    if (threadIdx.x < Config::kM / kRows) {
      const uint32_t in_stage = to + stage * Config::kM * 4;
      if constexpr (kAligned) {
        ptx::cp_async_16(in_stage, a, inside ? size : 0);
      } else {
        ptx::cp_async_4(in_stage, a, inside ? size : 0);
      }
    }
    a += a_stride;
  }
};

// A lane's addresses for an operand's ldmatrix: 16 rows x 32 bytes, for each 32 bytes of a stage's K. kOnce: not
// computed anew in each trip of the main loop (csrc/README.md).
template <class Config, bool kOnce>
struct MatrixAddress {
  static constexpr int kSteps = Config::kStageK / 32;
  uint32_t step[kSteps];

  // chunk: which 16 of the 32 bytes this lane's 8 x 8 matrix has
  __device__ MatrixAddress(const uint8_t* stage, int row, int chunk) {
#pragma unroll
    for (int k = 0; k < kSteps; ++k) {
      step[k] = ptx::shared_address(stage) + SwizzledRows<Config::kStageK>::offset(row, 2 * k + chunk);
      if (kOnce) ptx::compute_here(step[k]);
    }
  }
};

// The product of one slice of K in shared memory: acc += a b.
template <class Config, bool kAddressesOnce>
struct SliceProduct {
  using Accumulators = typename Config::Accumulators;
  using Address = MatrixAddress<Config, kAddressesOnce>;
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

// Rows of a as they lie in a matrix.
template <class Config>
struct MatrixRowsCopy : OperandCopy<Config::kStageK, Config::kM, Config::kThreads> {
  using Base = OperandCopy<Config::kStageK, Config::kM, Config::kThreads>;
  static constexpr bool kAddressesOnce = Config::Element::kPromoted;
  __device__ MatrixRowsCopy(const GemmArguments& p, int64_t first_row, int64_t k, int64_t k_end, uint8_t* stage)
      : Base(p.a, first_row, k, k_end, stage) {}
  __device__ void next() const {}
  // Of the slices that may be copied in rounds of kStages, so many are. Before them, between two slices of a round, and
  // behind them; k: of the slice that is copied next.
  __device__ static int in_rounds(int slices) { return slices; }
  __device__ static void begin_rounds(int64_t) {}
  __device__ static void next_in_round(int) {}
  __device__ void end_rounds(const GemmArguments& p, int64_t first_row, int64_t k, int64_t k_end, uint8_t* stage) {
    *this = MatrixRowsCopy(p, first_row, k, k_end, stage);
  }
};

// The mainloop of operands that mma takes as they are. RowsCopy: where a's rows come from.
template <class Config, class RowsCopy>
struct MmaMainloopOf {
  using Element = typename Config::Element;
  static constexpr int kStages = Config::kStages;
  static constexpr bool kGated = true;  // the epilogue has gated activations
  struct Stages {
    uint8_t a[kStages][Config::kM * Config::kStageK], b[kStages][Config::kN * Config::kStageK];
    float a_scale[kStages][Element::kBlockScaled ? Config::kM : 4];
  };
  using Pipeline = typename Config::Pipeline;
  template <int kRows>
  using Copy = OperandCopy<Config::kStageK, kRows, Config::kThreads>;
  const GemmArguments& p;
  typename Config::SharedStorage& s;
  const int warp_m, warp_n;  // this warp's first row and column in the tile

  __device__ MmaMainloopOf(const GemmArguments& p, typename Config::SharedStorage& s, int warp_m, int warp_n)
      : p(p), s(s), warp_m(warp_m), warp_n(warp_n) {}
  template <class Tile>
  __device__ void operator()(const Tile& tile, typename Config::Accumulators& acc) const {
    const int whole = static_cast<int>((tile.k_end - tile.k) / Config::kStageK), slices = tile.slices(Config::kStageK);
    RowsCopy copy_a(p, tile.row, tile.k, tile.k_end, s.stage.a[0]);
    Copy<Config::kN> copy_b(p.b, tile.b_row, tile.k, tile.k_end, s.stage.b[0]);
    const SliceProduct<Config, RowsCopy::kAddressesOnce> product(s, warp_m, warp_n, threadIdx.x % 32);
    BlockScaleCopy<Config> scales(p, tile, warp_n, s.stage.a_scale[0]);
    const auto copy_masked = [&](int stage, int ahead, int slice) {
      if constexpr (Element::kBlockScaled) scales(stage, slice < slices);
      copy_a.masked(stage, ahead), copy_b.masked(stage, ahead);
      ptx::cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < kStages - 1; ++i) {
      copy_masked(i, i, i);
      copy_a.next();
    }
    copy_a.advance(kStages - 1), copy_b.advance(kStages - 1);

    acc.clear();
    const auto promote = [&](int stage, const auto& partial) { add_promoted(acc, partial, stage, scales); };

    // The steady part, in which all copies are of whole slices, in rounds of kStages, so that stages and columns are
    // constants. With promotion, an exit after each slice keeps the assembler from interleaving neighbouring slices,
    // for which it lacks the registers (a branch that is never taken does not help: 8 to 140 bytes of spills).
    constexpr bool kExits = Element::kPromoted;
    const int steady = copy_a.in_rounds(max(whole - kStages + 1, 0));
    const auto k_of_copy = [&](int slice) { return tile.k + (slice + kStages - 1) * Config::kStageK; };
    copy_a.begin_rounds(k_of_copy(0));
    const auto round = [&](int slices_left) {
#pragma unroll
      for (int stage = 0; stage < kStages; ++stage) {
        Pipeline::wait();
        if constexpr (Element::kBlockScaled) scales(Pipeline::before(stage), true);
        copy_a.whole(Pipeline::before(stage), stage), copy_b.whole(Pipeline::before(stage), stage);
        ptx::cp_async_commit();
        product(stage, acc, promote);
        copy_a.next_in_round(stage);
        if (kExits && slices_left == stage + 1) return;
      }
      copy_a.advance(kStages), copy_b.advance(kStages);
    };
#pragma unroll 1
    for (int left = steady; left >= (kExits ? 1 : kStages); left -= kStages) round(left);

    int slice = kExits ? steady : steady - steady % kStages, stage = slice % kStages;
    // Computed anew: addresses that both loops share would be moved between registers in the first one, 708 instead of
    // 687 instructions for 2^20 MAC of e4m3.
    copy_a.end_rounds(p, tile.row, k_of_copy(slice), tile.k_end, s.stage.a[0]);
    copy_b = Copy<Config::kN>(p.b, tile.b_row, k_of_copy(slice), tile.k_end, s.stage.b[0]);
#pragma unroll 1
    for (int ahead = 0; slice < slices; ++slice, ++ahead) {
      Pipeline::wait();
      copy_masked(Pipeline::before(stage), ahead, slice + kStages - 1);
      product(stage, acc, promote);
      copy_a.next();
      stage = Pipeline::after(stage);
    }
    Pipeline::drain();
  }

 private:
  // acc += the partial accumulators of a slice, times its block scales.
  __device__ void add_promoted(typename Config::Accumulators& acc, const typename Config::Accumulators& partial,
                               int stage, BlockScaleCopy<Config>& scales) const {
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
  }
};

template <class Config>
struct MmaMainloop : MmaMainloopOf<Config, MatrixRowsCopy<Config>> {
  using MmaMainloopOf<Config, MatrixRowsCopy<Config>>::MmaMainloopOf;
};

}  // namespace forwardpass
