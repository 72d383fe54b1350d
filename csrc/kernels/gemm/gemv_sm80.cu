// int8_gemm, fp8_gemm and w8a16_gemm of up to kGemvRows rows, bound by reading the weight once from memory to
// registers. The weight's rows are the sixteen rows of an mma, the rows of x its eight columns. A block computes
// sixteen outputs of each row of x; its warps share K, 128 at a time in turn, and their accumulators are added in the
// order of the warps.
//
// Memory binds. For 2 KB of the weight, sixteen rows of 128, a warp issues 54 instructions (int8), 168 (fp8) or, with
// 16-bit x, 158 to 256 (sm_80: 189 to 398, the most from e4m3 to bf16); in the time in which they arrive a
// multiprocessor could issue 800 (A100), 560 (H100) or 400 (H200). One dp4a or fma per product would be 16 or 64 for
// each row of x, instead of 8 or 16 mma for all rows. A warp loads its next 2 KB while it computes on the last: 32 KB
// in flight per multiprocessor with two blocks, twice what an H100 needs for its bandwidth (3.35 TB/s for 0.6 us is 15
// KB for each of 132). Loads of the weight are of whole sectors, each once.
//
// Counted at [1, 4096] x [4096, 4096], interpreted: 1.001 times the least bytes move (1.03 with w8a16_gemm's block
// scales); with x, 1.06 (int8) or 1.25 (16 bits) times as many sectors are requested from L2, with four rows 1.25 and
// 2.
//
// The order of K within an mma is free, as long as x and the weight agree: a lane loads 16 consecutive elements of a
// row, which the mma's own order would have in four pieces.
#include "device/dependent_launch.cuh"
#include "device/dispatch.h"
#include "device/epilogue/staged.cuh"
#include "device/upconvert.cuh"
#include "kernels/gemm/arguments.cuh"
#include "kernels/gemm/kernel.h"
#include "kernels/gemm/reduce_splits.h"

namespace forwardpass {

// Of each row of x: the rows of an mma.
constexpr int kGemvColumns = 16;

// X: the elements of x. int8 uses the int8 mma. e4m3 x and weight are upconverted to fp16, which holds them exactly and
// whose mma accumulates in fp32 on every architecture.
template <Dtype X>
struct GemvConfig {
  using Acc = std::conditional_t<X == Dtype::i8, int32_t, float>;
  static constexpr Dtype kAcc = X == Dtype::i8 ? Dtype::i32 : Dtype::f32;
  static constexpr Dtype kMma = X == Dtype::e4m3 ? Dtype::f16 : X;
  static constexpr int kN = kGemvColumns, kWarps = 8, kThreads = 32 * kWarps;
  static constexpr int kBlocksPerSm = 2;  // 128 registers: 32 for the weight and up to 32 for x, both double-buffered
  static constexpr int kXSize = size_of(X);  // also the number of 16-byte loads for 16 elements
};

// 16 bytes of a row, of which `left` are inside it; the others are zero.
template <class Load>
__device__ inline uint4 load_bytes(const uint8_t* p, int64_t remaining, Load load) {
  if (remaining >= 16) return load(p);
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = 0; i < remaining; ++i) {
    if (i < 8)
      low |= uint64_t{p[i]} << 8 * i;
    else
      high |= uint64_t{p[i]} << 8 * (i - 8);
  }
  return {uint32_t(low), uint32_t(low >> 32), uint32_t(high), uint32_t(high >> 32)};
}

// A lane's share of 128 of K: elements from 16 t and from 64 + 16 t on, of rows g and g + 8 of the weight and of row g
// of x (g = group_id(), t = thread_in_group()).
template <Dtype X>
struct GemvBlock {
  uint4 w[2][2];  // [half of K][row]
  uint4 x[2][GemvConfig<X>::kXSize];
  float scale[2][2];  // of this block of K, [row of the weight][row of x: 2 t, 2 t + 1]
};

// Where a lane loads them from.
template <Dtype X>
struct GemvOperands {
  static constexpr int kXSize = GemvConfig<X>::kXSize;
  const uint8_t *w[2], *x;                    // x: null if the lane has no row of it
  const float *weight_scale[2], *x_scale[2];  // of the first block of K; null: 1
  int64_t x_scale_stride, columns;
  uint64_t policy;

  __device__ GemvOperands(const GemmArguments& p, int64_t row) : policy(ptx::evict_first_policy()) {
    const int g = group_id(), t = thread_in_group();
    columns = p.a.columns;
    x = g < p.a.rows ? static_cast<const uint8_t*>(p.a.data) + (g * p.a.stride + t * 16) * kXSize : nullptr;
    x_scale_stride = p.blocks.a_stride;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Beyond the last row: the last one again, whose outputs are not stored.
      int64_t n = min(row + g + i * 8, p.b.rows - 1);
      ptx::compute_here(n);  // else the loop computes the addresses again: 374 instead of 333 instructions (fp8)
      w[i] = static_cast<const uint8_t*>(p.b.data) + n * p.b.stride + t * 16;
      weight_scale[i] = p.blocks.b ? p.blocks.b + scale_offset(p, n) : nullptr;
      x_scale[i] = p.blocks.a && 2 * t + i < p.a.rows ? p.blocks.a + 2 * t + i : nullptr;
    }
  }

  // Offset of the scales of a row of the weight: per 128 x 128 block if x has block scales too, else per row.
  __device__ static int64_t scale_offset(const GemmArguments& p, int64_t n) {
    const int64_t groups = ceil_div(p.a.columns, kScaleBlock);
    if (!p.blocks.a) return n * groups;
    const bool gated = p.gated(), up = gated && n % 16 >= 8;
    return (gated ? n / 16 * 8 + n % 8 : n) / kScaleBlock * groups + (up ? p.blocks.up_offset : 0);
  }

  // Loads block `block` of K; whole: all of its columns are inside.
  template <bool whole>
  __device__ void load(GemvBlock<X>& d, int64_t block) const {
    load_weight<whole>(d, block);
    load_x<whole>(d, block);
  }
  template <bool whole>
  __device__ void load_weight(GemvBlock<X>& d, int64_t block) const {
    const auto once = [this](const uint8_t* p) { return ptx::ld_once(p, policy); };
#pragma unroll
    for (int half = 0; half < 2; ++half)
#pragma unroll
      for (int i = 0; i < 2; ++i)
        d.w[half][i] = load_bytes(w[i] + offset_of(block, half), remaining<whole>(block, half), once);
  }
  // And the scales.
  template <bool whole>
  __device__ void load_x(GemvBlock<X>& d, int64_t block) const {
    const auto again = [](const uint8_t* p) { return *reinterpret_cast<const uint4*>(p); };
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t remaining = this->remaining<whole>(block, half);
#pragma unroll
      for (int i = 0; i < kXSize; ++i)
        d.x[half][i] =
            x ? load_bytes(x + offset_of(block, half) * kXSize + i * 16, remaining * kXSize - i * 16, again) : uint4{};
    }
    if constexpr (X != Dtype::i8) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float scale_w = weight_scale[i] ? weight_scale[i][block] : 1.0f;
#pragma unroll
        for (int j = 0; j < 2; ++j)
          d.scale[i][j] = x_scale[j] ? __fmul_rn(x_scale[j][block * x_scale_stride], scale_w) : scale_w;
      }
    }
  }

 private:
  __device__ static int64_t offset_of(int64_t block, int half) {
    return block * kScaleBlock + half * (kScaleBlock / 2);
  }
  template <bool whole>
  __device__ int64_t remaining(int64_t block, int half) const {
    return whole ? kScaleBlock : columns - offset_of(block, half) - thread_in_group() * 16;
  }
};

// acc [16 rows of the weight, 8 of x] += the product of one block of K.
template <Dtype X>
__device__ inline void mma(int32_t (&acc)[4], const GemvBlock<X>& d, Dtype) {
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      const uint32_t a[4] = {word(d.w[half][0], i), word(d.w[half][1], i), word(d.w[half][0], i + 1),
                             word(d.w[half][1], i + 1)},
                     b[2] = {word(d.x[half][0], i), word(d.x[half][0], i + 1)};
      ptx::mma_m16n8k32(acc, a, b, acc);
    }
}

template <Dtype X, Dtype W>
__device__ inline void mma_upconverted(float (&acc)[4], const GemvBlock<X>& d) {
  using Config = GemvConfig<X>;
  float partial[4] = {};
#pragma unroll
  for (int half = 0; half < 2; ++half)
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      uint32_t a[4], b[2];
      upconvert_rows<W, Config::kMma>(word(d.w[half][0], i), word(d.w[half][1], i), a);
      if constexpr (X == Dtype::e4m3) {
        upconvert<X, Config::kMma>(word(d.x[half][0], i), b);
      } else {
        b[0] = word(d.x[half][i / 2], i % 2 * 2);
        b[1] = word(d.x[half][i / 2], i % 2 * 2 + 1);
      }
      ptx::mma_m16n8k16<Config::kMma>(partial, a, b, partial);
    }
#pragma unroll
  for (int i = 0; i < 4; ++i) acc[i] = __fmaf_rn(partial[i], d.scale[i / 2][i % 2], acc[i]);
}

template <Dtype X>
__device__ inline void mma(float (&acc)[4], const GemvBlock<X>& d, Dtype w_dtype) {
  if (X != Dtype::e4m3 && w_dtype == Dtype::i8)
    mma_upconverted<X, Dtype::i8>(acc, d);
  else
    mma_upconverted<X, Dtype::e4m3>(acc, d);
}

template <Dtype X>
__global__ void __launch_bounds__(GemvConfig<X>::kThreads, GemvConfig<X>::kBlocksPerSm)
    gemv_kernel(const __grid_constant__ GemmArguments p) {
  using Config = GemvConfig<X>;
  using Acc = typename Config::Acc;
  __shared__ Acc sums[Config::kWarps][kGemvRows][Config::kN];
  __shared__ Staging staging;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const GemmTile tile = p.map.in_one_row<Config::kN>(blockIdx.x);
  const int64_t whole_blocks = tile.k_end / kScaleBlock;
  const GemvOperands<X> operands(p, tile.column);

  Acc acc[4] = {};
  GemvBlock<X> blocks[2];  // one is used while the other arrives
  int64_t block = tile.k / kScaleBlock + warp;
  const bool begins = block < whole_blocks;
  if (begins && p.b_first) operands.template load_weight<true>(blocks[0], block);
  ptx::wait_for_earlier_kernels();
  ptx::launch_dependents();
  if (begins && !p.b_first) operands.template load_weight<true>(blocks[0], block);
  if (begins) operands.template load_x<true>(blocks[0], block);
#pragma unroll 1
  while (block < whole_blocks) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int64_t next = block + Config::kWarps;
      if (next < whole_blocks) operands.template load<true>(blocks[1 - i], next);
      mma(acc, blocks[i], p.b.dtype);
      block = next;
      if (block >= whole_blocks) break;
    }
  }
  if (block * kScaleBlock < tile.k_end) {  // the warp whose turn it is takes the remainder
    operands.template load<false>(blocks[0], block);
    mma(acc, blocks[0], p.b.dtype);
  }

#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int m = accumulator_column(i), n = accumulator_row(i);
    if (m < kGemvRows) sums[warp][m][n] = acc[i];
  }
  __syncthreads();
  if (warp != 0) return;
#pragma unroll
  for (int i = lane; i < kGemvRows * Config::kN; i += 32) {
    const int m = i / Config::kN, n = i % Config::kN;
    Acc sum = sums[0][m][n];
#pragma unroll
    for (int w = 1; w < Config::kWarps; ++w) sum += sums[w][m][n];
    staging.at<Acc>(m, n) = sum;
  }
  __syncwarp();
  finish_staged<Config::kN, Acc, Config::kXSize == 2>(staging, p.out, 0, tile.column, tile.split);
}

template <Dtype X>
cudaError_t launch_gemv(const GemmParams& p, cudaStream_t stream) {
  using Config = GemvConfig<X>;
  const GemmArguments arguments(p, 1, Config::kN);
  const Launch launch{
      .grid = arguments.map.tiles, .block = Config::kThreads, .dependent = waits_for_earlier_kernels(p.choice.arch)};
  if (auto e = launch_kernel(gemv_kernel<X>, launch, stream, arguments)) return e;
  return reduce_splits(p, Config::kAcc, stream);
}

namespace {

cudaError_t launch_w8a16(const GemmParams& p, cudaStream_t stream) {
  return dispatch<Dtype::f16, Dtype::bf16>(p.a.dtype, [&](auto X) { return launch_gemv<X()>(p, stream); });
}

// A block reads all of x from L2: four rows of 16 bits are half as many bytes as its part of the weight. The second
// launch of split-K takes about as long as a multiprocessor takes to stream 16 rows of 8192. unmeasured
constexpr GemmKernel row(GemmKind kind, Arch arch, cudaError_t (*launch)(const GemmParams&, cudaStream_t)) {
  return {.arch = arch,
          .tile_m = kGemvRows,
          .tile_n = kGemvColumns,
          .kind = kind,
          .limits = {.rows = kGemvRows},
          .least_k = 8192,
          .launch = launch};
}
const GemmKernel kernels[] = {row(GemmKind::int8, sm_80, launch_gemv<Dtype::i8>),
                              row(GemmKind::fp8, sm_89, launch_gemv<Dtype::e4m3>),
                              row(GemmKind::w8a16, sm_80, launch_w8a16)};
const GemmKernels registered(kernels);

}  // namespace
}  // namespace forwardpass
