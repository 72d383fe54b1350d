#pragma once
// The main loops of int8 and e4m3 on wgmma, whose operands are 8 bits wide.
#include "device/swizzled_rows.cuh"
#include "kernels/gemm/wgmma.cuh"

namespace forwardpass {

// The wgmmas of operands that are both in shared memory.
template <class Config>
struct SharedOperands {
  uint32_t a, b;  // low halves of the wgmma descriptors of both operands in the first stage

  __device__ SharedOperands(typename Config::SharedStorage& s, const ConsumerPlace<Config>& place) {
    const uint8_t *rows_a = s.stage[0].a[place.group_row], *rows_b = s.stage[0].b[0][place.group_column];
    a = uniform(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_b : rows_a)));
    b = uniform(ptx::descriptor(ptx::shared_address(Config::kTransposed ? rows_a : rows_b)));
  }
  __device__ void load(int) {}
  // One group of wgmmas: 64 rows by the 128 of K of a stage.
  template <class Row>
  __device__ void mma(Row& acc, int stage, int, bool accumulate) const {
    const uint32_t first = stage * Config::kStageUnits;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step) {
      const uint32_t k = step * 32 / ptx::kDescriptorUnit;
      ptx::wgmma_k32(acc, a + first + k, b + first + k, accumulate || step > 0);
    }
  }
};

// Those whose a is in registers. From shared memory each group of wgmmas would read it anew: of a stage of 128 x 256 in
// two passes 96 KB are read instead of 80, which with the 48 that TMA writes take 1152 clocks, of which the tensor
// cores work 1024.
template <class Config>
struct RegisterOperands {
  uint32_t a;  // address of this lane's 16 bytes in the first stage
  uint32_t b;  // low half of the wgmma descriptor in the first stage
  uint32_t rows[Config::kSteps][4];

  __device__ RegisterOperands(typename Config::SharedStorage& s, const ConsumerPlace<Config>& place) {
    using Rows = SwizzledRows<Config::kStageK>;
    const int lane = threadIdx.x % 32;
    a = uniform(ptx::shared_address(s.stage[0].a[place.row]) + Rows::offset(lane % 16, lane / 16), lane);
    b = uniform(ptx::descriptor(ptx::shared_address(s.stage[0].b[0][place.group_column])));
  }
  // A stage's a, once it is full and the wgmmas of the stage before have completed.
  __device__ void load(int stage) {
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step)
      ptx::ldmatrix_x4(rows[step], (a + stage * sizeof(typename Config::Stage)) ^ step * 32);
  }
  template <class Row>
  __device__ void mma(Row& acc, int stage, int pass, bool accumulate) const {
    const uint32_t first =
        b + stage * Config::kStageUnits + pass * Config::kPassTiles * 8 * Config::kStageK / ptx::kDescriptorUnit;
#pragma unroll
    for (int step = 0; step < Config::kSteps; ++step)
      ptx::wgmma_k32(acc, rows[step], first + step * 32 / ptx::kDescriptorUnit, accumulate || step > 0);
  }
};

// The mainloop with exact accumulators: the wgmmas of a stage run while the next ones are issued, and the stage is
// released when they have completed. begin_epilogue(): Epilogue::begin, whose loads take as long as two stages (behind
// one, modelled: int8 1024 x 4096 x 1024 takes 15917 clocks, behind two 15272).
template <class Config>
struct ExactMainloop : NoScales {
  ConsumerPipeline<Config> pipeline;
  SharedOperands<Config> operands;

  __device__ ExactMainloop(const WgmmaArguments<Config>& p, typename Config::SharedStorage& s,
                           const ConsumerPlace<Config>& place)
      : pipeline(p.map, s), operands(s, place) {}
  template <class Tile, class F>
  __device__ void operator()(const Tile& tile, typename Config::Accumulators& acc, F begin_epilogue) {
    const int slices = tile.slices(Config::kStageK);
    int before = pipeline.stage;
    const auto multiply = [&](bool accumulate) {
      pipeline.wait_full();
      ptx::wgmma_fence();
      operands.mma(acc[0], pipeline.stage, 0, accumulate);
      ptx::wgmma_commit();
    };
    const auto release_before = [&] {
      ptx::wgmma_wait<1>();
      pipeline.release(before);
      before = pipeline.stage;
      pipeline.advance();
    };
    multiply(false);
    pipeline.advance();
    if (slices > 1) multiply(true);
    begin_epilogue();
    if (slices > 1) release_before();
#pragma unroll 1
    for (int left = slices - 2; left > 0; --left) {
      multiply(true);
      release_before();
    }
    ptx::wgmma_wait<0>();
    pipeline.release(before);
  }
};

// Where the block scales of b are in the one row that TMA sees: where they begin, the distance from one row of blocks
// to the next, and from the first to the second scale of a stage.
struct BlockOrder {
  int first, row, next;
};

// The block scales of a main loop with promotion: its arguments, and what the producer loads of them. Without any they
// are 1.
template <class Config>
struct BlockScaleLoads {
  using Rows = MatrixRows;
  static constexpr bool kGated = true;  // the epilogue has gated activations
  struct Arguments {
    bool scaled, gated;
    BlockOrder order;
    CUtensorMap a, b;
  };
  static cudaError_t set_arguments(Arguments& to, const GemmParams& p, int tile_m) {
    to.scaled = p.blocks.a, to.gated = is_gated(p.epilogue.activation);
    if (!to.scaled) return cudaSuccess;
    const int64_t depth = ceil_div(p.a.columns, kScaleBlock), next = to.gated ? p.blocks.up_offset : depth,
                  of_one = block_scales_of(p.blocks, to.gated, p.columns(), p.a.columns),
                  count = p.groups.ends ? p.groups.experts * of_one : of_one;
    // The row that TMA sees begins at a multiple of 16 bytes; the first scale may lie behind that.
    const auto address = reinterpret_cast<uintptr_t>(p.blocks.b);
    const int first = static_cast<int>(address % 16 / sizeof(float));
    to.order = {first, static_cast<int>(depth), static_cast<int>(next)};
    if (auto e = encode(to.a, p.blocks.a, depth, p.a.rows, p.blocks.a_stride, tile_m)) return e;
    return encode(to.b, reinterpret_cast<const void*>(address / 16 * 16), 1, first + count,
                  ceil_div(first + count, 4) * 4, 4);
  }
  template <class P>
  __device__ static void begin(const P& p, typename Config::SharedStorage& s) {
    if (p.mainloop.scaled) return;
    for (auto& scales : s.scales) {
      if (threadIdx.x < Config::kM) scales.a[threadIdx.x] = 1;
      if (threadIdx.x == 0) scales.b[0] = scales.next_b[0] = 1;
    }
  }
  template <class P>
  __device__ static int scale_bytes(const P& p) {
    return p.mainloop.scaled ? Config::kScaleBytes : 0;
  }

  // Those of a tile.
  struct OfTile {
    const Arguments& p;
    const int row, b_block;

    __device__ void load(typename Config::SharedStorage& s, int stage, int k, uint32_t full) const {
      if (!p.scaled) return;
      const int block = k / kScaleBlock;
      auto& scales = s.scales[stage];
      ptx::tma_load(ptx::shared_address(scales.a), p.a, row, block, full);
      ptx::tma_load(ptx::shared_address(scales.b), p.b, b_block + block, 0, full);
      ptx::tma_load(ptx::shared_address(scales.next_b), p.b, b_block + block + p.order.next, 0, full);
    }
  };
  template <class P, class Tile>
  __device__ static OfTile scales_of(const P& p, const Tile& tile) {
    const Arguments& m = p.mainloop;
    const int column = static_cast<int>(tile.column);
    return {m, static_cast<int>(tile.row),
            m.order.first + column / (m.gated ? 2 * kScaleBlock : kScaleBlock) * m.order.row + blocks_before(p, tile)};
  }

 private:
  static cudaError_t encode(CUtensorMap& to, const void* data, int64_t rows, int64_t columns, int64_t stride, int box) {
    return encode_boxes(to, CU_TENSOR_MAP_DATA_TYPE_FLOAT32, data, rows, columns, stride * 4, 1, box,
                        CU_TENSOR_MAP_SWIZZLE_NONE);
  }
  // Block scales of the experts before the tile's.
  template <class P, class Tile>
  __device__ static int blocks_before(const P& p, const Tile& tile) {
    if (tile.expert == 0) return 0;
    const BlockOrder& order = p.mainloop.order;
    const int columns =
        ptx::unknown(static_cast<int>(p.out.columns));  // else the product, the same in all tiles, spills
    return tile.expert * (p.mainloop.gated ? 2 * order.next : (columns + kScaleBlock - 1) / kScaleBlock * order.row);
  }
};

// The mainloop with promotion: after each stage the partial accumulators, times the stage's scales, are added to the
// fp32 ones. While one warpgroup promotes them, the other's wgmmas run.
template <class Config>
struct PromotingMainloop : BlockScaleLoads<Config> {
  // A warpgroup's columns are not whole blocks of b's scales: 192, which begin with a block or in the middle of one.
  static constexpr bool kStraddles = !Config::kTransposed && Config::kConsumerN % kScaleBlock != 0;
  // The factors for a thread's accumulators of a stage: for each pair of rows of a that the thread has, the scale of
  // either row times those of b: for each pass of even and of odd n8 tiles (or, transposed, of a thread's first row and
  // of the row eight below), which differ if they are gates and ups. Of 192 columns those of the first 64, of the last,
  // and of the 64 in the middle.
  static constexpr int kPairs = Config::kTransposed ? Config::kTilesN : 1, kSets = kStraddles ? 3 : 2 * Config::kPasses;
  struct Factors {
    float factor[kPairs][2][kSets];
    __device__ float of(int j, int e) const {
      return Config::kTransposed ? factor[j][e % 2][e / 2] : factor[0][e / 2][set_of(j)];
    }
    // Of the columns of an n8 tile.
    __device__ static constexpr int set_of(int j) {
      constexpr int kFirst = 0, kLast = 1, kMiddle = 2, kHalfBlock = kScaleBlock / 2 / 8;
      if (kStraddles) return j < kHalfBlock ? kFirst : j < 2 * kHalfBlock ? kMiddle : kLast;
      return j / Config::kPassTiles * 2 + j % 2;
    }
  };
  using Operands = std::conditional_t<Config::kPasses == 1, SharedOperands<Config>, RegisterOperands<Config>>;
  ConsumerPipeline<Config> pipeline;
  Operands operands;
  // In the first stage: scales of a from this thread's first row on; of b those of the sets.
  uint32_t a_scale, b_scale[kSets];

  __device__ PromotingMainloop(const WgmmaArguments<Config>& p, typename Config::SharedStorage& s,
                               const ConsumerPlace<Config>& place)
      : pipeline(p.map, s), operands(s, place) {
    const int first = place.row + (Config::kTransposed ? accumulator_column(0) : accumulator_row(0));
    a_scale = uniform(ptx::shared_address(&s.scales[0].a[first]), threadIdx.x % 32);
#pragma unroll
    for (int i = 0; i < kSets; ++i) {
      const bool next = p.mainloop.gated || kStraddles ? i % 2 : i / 2;
      b_scale[i] = uniform(ptx::shared_address(next ? s.scales[0].next_b : s.scales[0].b));
    }
  }
  __device__ Factors load_factors() const {
    const uint32_t first = pipeline.stage * sizeof(typename Config::Scales);
    float b[kSets];
#pragma unroll
    for (int i = 0; i < kSets; ++i) b[i] = ptx::load_shared(b_scale[i] + first);
    Factors factors;
#pragma unroll
    for (int i = 0; i < kPairs; ++i)
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float a = ptx::load_shared(a_scale + first + (Config::kTransposed ? i * 8 + j : j * 8) * sizeof(float));
#pragma unroll
        for (int k = 0; k < kSets; ++k) factors.factor[i][j][k] = a * b[k];
      }
    return factors;
  }
  template <class Tile, class F>
  __device__ void operator()(const Tile& tile, typename Config::Accumulators& acc, F begin_epilogue) {
    begin_epilogue();  // in the loop its instructions would be among every stage's
    acc.clear();
    if (kStraddles) b_scale[kSets - 1] = tile.column % kScaleBlock == 0 ? b_scale[0] : b_scale[1];
    const int slices = tile.slices(Config::kStageK);
    pipeline.wait_full();
    operands.load(pipeline.stage);
#pragma unroll 1
    for (int slice = 1; slice <= slices; ++slice) {
      Factors factors;
#pragma unroll
      for (int pass = 0; pass < Config::kPasses; ++pass) {
        typename Config::Acc partial[Config::kPassTiles][4];
        ptx::wgmma_fence();
        operands.mma(partial, pipeline.stage, pass, false);
        ptx::wgmma_commit();
        if (pass == 0) factors = load_factors();  // while the wgmmas run
        ptx::wgmma_wait<0>();
        pipeline.release(pipeline.stage, pass);
        if (pass == Config::kPasses - 1) {
          pipeline.advance();
          if (slice < slices) {  // what is loaded arrives during the promotion
            pipeline.wait_full();
            operands.load(pipeline.stage);
          }
        }
#pragma unroll
        for (int j = 0; j < Config::kPassTiles; ++j)
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int all = pass * Config::kPassTiles + j;
            acc[0][all][e] = fmaf(partial[j][e], factors.of(all, e), acc[0][all][e]);
          }
      }
    }
  }
};

}  // namespace forwardpass
