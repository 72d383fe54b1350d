#pragma once
// What the torch side and the kernels of every GEMM share: the operands, and how a product is cut up. No torch, no
// CUDA.
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

// A product of a [m, k] and b [n, k] transposed. group: columns of a row that are to have one scale as the output is
// quantised, 128, or 256 of gate and up; 0: it is not.
struct GemmShape {
  int64_t m, n, k;
  int32_t group;
};

// Which kernel computes a GEMM, and how the product is cut up (kernels/gemm.cpp). A product whose depth is split leaves
// `splits` sums of each output in the workspace, and dequant_activation's kernel adds them and does the epilogue.
struct KernelChoice {
  int32_t arch, tile_m, tile_n;  // of the kernel
  bool quantizes;                // it makes a shape's groups e4m3, if the depth is not split
  int64_t splits, split_k;       // split_k: what one split takes of K, a multiple of kScaleBlock
  int32_t cluster, blocks;  // persistent: blocks that share tiles of b, and how many run, each making tile after tile
};

// Of the shape and the device alone: the same inputs give the same bits. Returns a cudaError_t.
using KernelSelector = int(const GemmShape* shape, const Device* device, KernelChoice* choice);

// The most rows that the GEMV takes (gemv_sm80.cuh).
constexpr int kGemvRows = 4;

// a [M, K] times b [N, K] transposed, then the epilogue. Rows of a and b begin at multiples of 16 bytes.
struct GemmParams {
  Matrix a, b;  // i8, or e4m3
  BlockScales blocks;
  Epilogue epilogue;
  KernelChoice choice;
  void* partial;  // [splits, M, N] accumulators, rows partial_stride elements apart; null without splits
  int64_t partial_stride;
};

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace forwardpass
