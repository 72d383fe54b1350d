#pragma once
// What the torch side and the kernels of every GEMM share: the operands, and how a product is cut up. No torch, no
// CUDA.
#include <algorithm>

#include "params/common.h"
#include "params/device.h"

namespace forwardpass {

// Columns of K that share a scale of a block-scaled operand, and between two promotions of fp8 sums.
constexpr int kScaleBlock = 128;

// fp8: scales of blocks of 1 x 128 of a and 128 x 128 of b, in place of the epilogue's a_scale and b_scale. 8-bit
// weights alone (w8a16_gemm): of 1 x 128 of b, and none of a.
struct BlockScales {
  const float* a;     // [rows, K blocks], rows contiguous, blocks a_stride apart; or null
  int64_t a_stride;   //
  const float* b;     // [row blocks, K blocks] contiguous; null: no block scales
  int64_t up_offset;  // 128 x 128, gated: b has those of gate, then, up_offset elements on, of up
};

// How a GEMM is computed, chosen by plan_gemm. A product whose depth is split leaves `splits` sums of each output in
// the workspace, and dequant_activation's kernel adds them and does the epilogue.
struct GemmPlan {
  enum class Path : int32_t { mma, wgmma, gemv } path;
  int32_t tile_m, tile_n;
  int64_t splits, split_k;  // split_k: what one split takes of K, a multiple of kScaleBlock
  int32_t cluster, blocks;  // wgmma: blocks that share tiles of b, and how many run, each making tile after tile
};

// The most rows that the GEMV takes (gemv_sm80.cuh).
constexpr int kGemvRows = 4;

// a [M, K] times b [N, K] transposed, then the epilogue. Rows of a and b begin at multiples of 16 bytes.
struct GemmParams {
  Matrix a, b;  // i8, or e4m3
  BlockScales blocks;
  Epilogue epilogue;
  GemmPlan plan;
  void* partial;  // [splits, M, N] accumulators, rows partial_stride elements apart; null without splits
  int64_t partial_stride;
};

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// A function of the shape, the operands' type and the device alone: the same inputs give the same bits. whole: columns
// of a row that one warpgroup of a tile on wgmma, or both, have to hold together, 128 or 256; 0: none.
inline GemmPlan plan_gemm(int64_t m, int64_t n, int64_t k, Dtype type, Device device, int32_t whole = 0) {
  GemmPlan plan{};
  int64_t least_k = 256;
  const int32_t fewest = m <= 16 ? 16 : m <= 64 ? 64 : 128;  // rows of a tile that holds M, or 128
  if (m <= kGemvRows) {
    // A block of the GEMV reads all of x from L2: of four rows of 16 bits half as many bytes as it has of the weight.
    plan.path = GemmPlan::Path::gemv;
    plan.tile_m = kGemvRows;
    plan.tile_n = 16;
    // The second launch takes about as long as a multiprocessor takes to stream 16 rows of 8192. unmeasured
    least_k = 8192;
  } else if (device.wgmma && size_of(type) == 2) {
    // The product is made transposed: its rows are a wgmma's columns, of which there are as many as are needed. Below
    // 128 the weight's bytes bind, as on mma.sync. A cluster shares the rows of x.
    plan.path = GemmPlan::Path::wgmma;
    plan.tile_m = fewest;
    plan.tile_n = 128;
    plan.cluster = ceil_div(n, 128) % 2 == 0 || ceil_div(n, 128) > 16 ? 2 : 1;
    plan.blocks = device.sms;
  } else if (device.wgmma) {
    plan.path = GemmPlan::Path::wgmma;
    // Of few rows the weight's bytes bind: 14 a clock of an H100's multiprocessor are 1900 of its 4096 multiply-adds at
    // 128 rows. But what a tile has of a goes through shared memory too, be it zeros: modelled, int8 16 x 1024 x 1024
    // takes 1.68 us in tiles of 128 rows, 0.58 in tiles of 16.
    plan.tile_m = whole ? 128 : fewest;
    // 128 x 256 needs 48 bytes a clock of L2, or 32 in clusters of two, 128 x 128 64 or 48; but of large tiles
    // there are half as many, and the last round of them may leave more of the multiprocessors idle.
    const int64_t rows = ceil_div(m, plan.tile_m), rounds = ceil_div(rows * ceil_div(n, 256), device.sms),
                  small_rounds = ceil_div(rows * ceil_div(n, 128), device.sms);
    plan.tile_n = plan.tile_m < 128 || (whole <= 128 && small_rounds < 2 * rounds) ? 128 : 256;
    // An odd row of tiles has a row without work beside it: less than the bytes that it saves from 16 rows on.
    plan.cluster = rows % 2 == 0 || rows > 16 ? 2 : 1;
    plan.blocks = device.sms;
  } else {
    // The fewest rows that hold M: below 128 the weight's bytes bind, not the tensor cores (at 64 rows 128 operations a
    // byte; an A100 does 312 a byte of its memory, an L40S 850, an H100 590). unmeasured
    plan.tile_m = fewest;
    plan.tile_n = 128;
  }
  // Fewer tiles than multiprocessors leave memory bandwidth unused: as many splits as fill them once, each of 256 of K
  // or more. The partial sums, 8 bytes an output and split, stay in L2; at 16 rows they are half of the weight's bytes.
  // modelled on an H100, against 512: int8 16 x 1024 x 1024, in tiles of 128 rows, 1.68 for 2.24 us
  const int64_t tiles = ceil_div(m, plan.tile_m) * ceil_div(n, plan.tile_n);
  const int64_t most = std::min(std::max<int64_t>(k / least_k, 1), int64_t{16});
  plan.splits = std::min(std::max<int64_t>(device.sms / tiles, 1), most);
  plan.split_k = ceil_div(ceil_div(k, plan.splits), kScaleBlock) * kScaleBlock;
  plan.splits = ceil_div(k, plan.split_k);
  return plan;
}

}  // namespace forwardpass
