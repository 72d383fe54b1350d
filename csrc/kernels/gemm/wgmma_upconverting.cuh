#pragma once
// The main loop of 8-bit weights and 16-bit x on wgmma m64nNk16, with swap-AB: the weight is the first operand, which a
// wgmma takes from registers, where it is upconverted. x is the second one, in shared memory as TMA stored it; its rows
// are the wgmma's columns, of which there may be as few as eight.
//
// A lane needs the weight in pairs of elements, one pair of each eight of a row. The order of K would be free, and with
// it loads of 16 bytes, if x had the same order; but x comes by TMA, which moves at least 16 bytes, and is read by the
// tensor cores. So loads are of two bytes, 32 for the 64 elements that a lane has of a stage; four loads of 16 bytes
// would need 16 shuffles and 48 selections and permutations.
//
// Shared memory binds, at 128 bytes a clock. Of 128 x 256, 64 of K take the tensor cores 1024 clocks, and it 960: 40 KB
// written by TMA, 64 KB read by wgmma, and 8 KB by loads that use half of its width. (Of 128 x 128 it was 576 of 512; a
// weight that is upconverted into shared memory would take 1152 of 1024, as it is written and read once more.)
//
// For these 1024 clocks a consumer warp issues 79 instructions (e4m3 to fp16), 112 (int8 to fp16), 127 (e4m3 to bf16)
// or 128 (int8 to bf16), and with block scales 230 to 280; a scheduler has two such warps. Static counts, nvcc 13.0.
// Modelled on an H100 at 1600 MHz, 2048 x 4096 x 4096, int8 to bf16: 750 TFLOP/s, with block scales 650; in tiles of
// 128 x 128 it was 591 and 582.
#include "device/swizzled_rows.cuh"
#include "device/upconvert.cuh"
#include "kernels/gemm/wgmma.cuh"

namespace forwardpass {

// a: the 8-bit weight, upconverted to X; b: x. kBlockScaled: there may be block scales. Of 128 x 256 a kernel for both
// has too few registers, and ptxas serialises its wgmmas.
template <Dtype X_, bool kBlockScaled_>
struct Upconverted {
  static constexpr Dtype X = X_;
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = size_of(X);
  static constexpr bool kSwapAB = true, k16Bits = true, kPromoted = false, kBlockScaled = kBlockScaled_;
};

// One half of a stage is upconverted while the wgmmas of the other half run. With block scales each stage's products
// are added to the accumulators in fp32, times the scales of their block: those of 128 rows of x at a time, as
// registers allow, while the other warpgroup's wgmmas run.
template <class Config>
struct UpconvertingMainloop : NoScales {
  struct Arguments {
    Dtype w_dtype;           // of the weight, i8 or e4m3
    const float* row_scale;  // its 1 x 128 scales, [rows of the weight, K blocks]; null: none
  };
  static cudaError_t set_arguments(Arguments& to, const GemmParams& p, int) {
    to = {p.b.dtype, p.blocks.a ? nullptr : p.blocks.b};
    return cudaSuccess;
  }
  static_assert(Config::kConsumersM == Config::kConsumers);
  static constexpr Dtype X = Config::Element::X;
  static constexpr int kHalf = Config::kStageK / 2, kSteps = kHalf / 16;
  static constexpr int kPartTiles = Config::kTilesN < 16 ? Config::kTilesN : 16, kParts = Config::kTilesN / kPartTiles;
  using Operand = uint32_t[kSteps][4];  // the first one of half a stage's wgmmas
  const WgmmaArguments<Config>& p;
  ConsumerPipeline<Config> pipeline;
  int row;          // this thread's first in the tile
  uint32_t weight;  // address of this lane's first two elements in the first stage
  uint32_t x;       // low half of x's descriptor in the first stage

  __device__ UpconvertingMainloop(const WgmmaArguments<Config>& p, typename Config::SharedStorage& s,
                                  const ConsumerPlace<Config>& place)
      : p(p), pipeline(p.map, s), row(place.row + accumulator_row(0)) {
    const int chunk = SwizzledRows<Config::kStageK>::swizzle(group_id());
    weight = uniform(ptx::shared_address(&s.stage[0].a[row][chunk * 16 + accumulator_column(0)]), threadIdx.x % 32);
    x = uniform(ptx::descriptor(ptx::shared_address(s.stage[0].b)));
  }

  template <class F>
  __device__ void operator()(const GemmTile& tile, typename Config::Accumulators& acc, F begin_epilogue) {
    begin_epilogue();
    acc.clear();
    if (p.mainloop.w_dtype == Dtype::i8)
      multiply<Dtype::i8>(tile, acc);
    else
      multiply<Dtype::e4m3>(tile, acc);
  }

 private:
  template <Dtype W>
  __device__ void multiply(const GemmTile& tile, typename Config::Accumulators& acc) {
    Operand upconverted[2];
    pipeline.wait_full();
    upconvert_half<W>(upconverted[0], 0);
    if constexpr (Config::Element::kBlockScaled)
      multiply_blocks<W>(tile, acc, upconverted);
    else
      multiply_all<W>(tile, acc, upconverted);
  }
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
  // To the next stage, if there is one, while the wgmmas of this one's second half run.
  template <Dtype W>
  __device__ void advance(Operand& upconverted, bool more) {
    pipeline.advance();
    if (!more) return;
    pipeline.wait_full();
    ptx::wgmma_wait<1>();
    upconvert_half<W>(upconverted, 0);
  }
  // One group of wgmmas: kTiles * 8 rows of x, from part `part` on, by half a stage.
  template <int kTiles>
  __device__ void mma(float (&acc)[kTiles][4], const Operand& upconverted, int half, int stage, int part,
                      bool accumulate) const {
    const uint32_t rows =
        x + stage * Config::kStageUnits + part * kTiles * 8 * Config::kBoxBytes / ptx::kDescriptorUnit;
    ptx::wgmma_fence();
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int bytes = (half * kSteps + step) * 32, box = bytes / Config::kBoxBytes;
      ptx::wgmma_k16<X>(
          acc, upconverted[step],
          rows + (box * int{sizeof(Config::Stage::b[0])} + bytes % Config::kBoxBytes) / ptx::kDescriptorUnit,
          accumulate || step > 0);
    }
    ptx::wgmma_commit();
  }
  template <Dtype W>
  __device__ void multiply_all(const GemmTile& tile, typename Config::Accumulators& acc, Operand (&upconverted)[2]) {
    const int slices = tile.slices(Config::kStageK);
    int before = 0;
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      const int stage = pipeline.stage;
      mma(acc[0], upconverted[0], 0, stage, 0, true);
      ptx::wgmma_wait<1>();
      if (i > 0) pipeline.release(before);
      upconvert_half<W>(upconverted[1], 1);
      mma(acc[0], upconverted[1], 1, stage, 0, true);
      before = stage;
      advance<W>(upconverted[0], i + 1 < slices);
    }
    ptx::wgmma_wait<0>();
    pipeline.release(before);
  }
  template <Dtype W>
  __device__ void multiply_blocks(const GemmTile& tile, typename Config::Accumulators& acc, Operand (&upconverted)[2]) {
    const int64_t blocks = ceil_div(p.map.k, kScaleBlock), first = tile.row + row;
    const float* scales[2];
#pragma unroll
    for (int i = 0; i < 2; ++i)
      scales[i] = p.mainloop.row_scale
                      ? p.mainloop.row_scale + min(first + i * 8, p.out.columns - 1) * blocks + tile.k / kScaleBlock
                      : nullptr;
    const int slices = tile.slices(Config::kStageK);
#pragma unroll 1
    for (int i = 0; i < slices; ++i) {
      const int stage = pipeline.stage, block = i * Config::kStageK / kScaleBlock;
      const float scale[2] = {scales[0] ? scales[0][block] : 1, scales[1] ? scales[1][block] : 1};
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        float partial[kPartTiles][4];
        mma(partial, upconverted[0], 0, stage, part, false);
        if (part == 0) upconvert_half<W>(upconverted[1], 1);
        mma(partial, upconverted[1], 1, stage, part, true);
        if (part == kParts - 1) advance<W>(upconverted[0], i + 1 < slices);
        ptx::wgmma_wait<0>();
        if (part == kParts - 1) pipeline.release(stage);
#pragma unroll
        for (int j = 0; j < kPartTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            float& sum = acc[0][part * kPartTiles + j][e];
            sum = fmaf(partial[j][e], scale[e / 2], sum);
          }
      }
    }
  }
};

}  // namespace forwardpass
