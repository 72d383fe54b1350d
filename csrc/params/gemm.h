#pragma once
// What the torch side and the kernels of every GEMM share: the operands, and the kernel that is selected. No torch, no
// CUDA.
#include "params/common.h"
#include "params/device.h"
#include "params/int8_conv2d.h"

namespace forwardpass {

// Columns of K that share a block scale, and between two promotions of fp8 accumulators.
constexpr int kScaleBlock = 128;

// Block scales. fp8: 1 x 128 of a and 128 x 128 of b. w8a16, which has 8-bit weights only: 1 x 128 of b, none of a.
struct BlockScales {
  const float* a;  // [rows, K blocks], rows contiguous, blocks a_stride apart; or null
  int64_t a_stride;
  const float* b;     // [row blocks, K blocks] contiguous; null: no block scales
  int64_t up_offset;  // 128 x 128, gated: those of up are up_offset elements behind those of gate
};

// A grouped GEMM: each row of a is an expert's, and multiplied by that expert's rows of b, [experts, columns, k]. Rows
// of a are sorted by expert, or there is room for as many of each. Rows of none are zeros in the output; where an end
// or a count is wrong, rows of which it is unknown whose they are (ops/common/experts.py) are NaN.
struct Groups {
  const int32_t*
      ends;  // [experts]: sorted, where each one's rows end; else how many of its rows count. null: one product
  int32_t experts;
  bool sorted;
  int64_t room;  // not sorted: rows for each
};

// What is multiplied: both operands int8, both e4m3, an 8-bit weight and 16-bit activations; or int8 windows of images
// and a convolution's weight.
enum class GemmKind : int32_t { int8, fp8, w8a16, int8_conv2d };

// The most rows and columns of a convolution's kernel: four bits of a word of 64 for each (window_copy.cuh).
constexpr int kMostKernelSide = 15;

// a [m, k] times b [n, k] transposed. group: columns of an output row that share a scale as the output is quantised:
// 128, or the 256 of gate and up, or all; 0: it is not quantised in groups. gated_blocks: gate and up have block
// scales. experts: a grouped GEMM of so many products, of m rows on average; 0: one product.
struct GemmShape {
  int64_t m, n, k;
  GemmKind kind;
  int32_t group;
  bool gated_blocks;
  int32_t experts;
  const Conv2dShape* windows;  // of a convolution, whose rows of a are windows; else null
};

// Which kernel computes a GEMM, and how the output is divided (kernels/gemm/select.cpp). With split-K there are
// `splits` partial sums of each output. Either the splits of a tile are the blocks of a cluster, which adds them in
// shared memory and runs the epilogue; or the kernel leaves them in the workspace, and dequant_activation's kernel does
// so. The bits are the same: both add in the order of the splits, and have one epilogue.
struct KernelChoice {
  const struct GemmKernel* kernel;  // a row of the tables
  bool quantizes;                   // it quantises the shape's groups, unless there is split-K
  int64_t splits, split_k;          // split_k: of K, for one split; a multiple of kScaleBlock
  int32_t cluster, blocks;          // of persistent kernels: blocks that share an operand, blocks of the grid
  bool cluster_sums;                // a cluster has all splits of its tiles, `cluster` times `splits` blocks
  int32_t arch;                     // of the device
};

// What a KernelSelector returns for a shape that is beyond the limits of every kernel that there is for the device: a
// cudaErrorInvalidValue.
constexpr int kBeyondEveryKernel = 1;

// A function of shape and device only: the same inputs give the same bits. Returns a cudaError_t.
using KernelSelector = int(const GemmShape* shape, const Device* device, KernelChoice* choice);

// The most rows that the GEMV takes (gemv_sm80.cu).
constexpr int kGemvRows = 4;

// The most blocks of a cluster, on every device that has clusters.
constexpr int kClusterBlocks = 8;

// a [M, K] times b [N, K] transposed, then the epilogue. Rows of a and b begin at multiples of 16 bytes.
struct GemmParams {
  static constexpr const char* kLauncher = "forwardpass_gemm";
  static constexpr const char* kSelector = "forwardpass_select_gemm";
  GemmKind kind;
  Matrix a, b;         // i8, or e4m3; w8a16: a is f16 or bf16
  BlockScales blocks;  // instead of the epilogue's scales
  Epilogue epilogue;
  KernelChoice choice;
  bool b_first;   // no kernel that may still run when this one begins writes b
  void* partial;  // [splits, M, N] accumulators, rows partial_stride elements apart; null if no kernel leaves any
  int64_t partial_stride;
  Groups groups;
  // int8_conv2d: of one group, whose first channel a.data is. Strides are multiples of 16; a.stride is not used.
  Conv2dShape windows;

  // Of the accumulators, of an expert if there are several.
  int64_t columns() const { return groups.ends ? b.rows / groups.experts : b.rows; }
};

HOST_DEVICE constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Of 128 x 128 scales, those of a b [columns, k]; of a grouped GEMM, of each expert's.
HOST_DEVICE constexpr int64_t block_scales_of(const BlockScales& scales, bool gated, int64_t columns, int64_t k) {
  return gated ? 2 * scales.up_offset : ceil_div(columns, kScaleBlock) * ceil_div(k, kScaleBlock);
}

// What one expert has in place of what all have, from its first row of b on.
HOST_DEVICE inline void take_expert(Epilogue& e, const Epilogue& all, int64_t first) {
  // As a branch it costs registers: w8a16's tile of 64 rows would spill.
  e.b_scale = all.b_scale + (all.b_scale ? first : 0);
  if (all.bias) e.bias = static_cast<const char*>(all.bias) + first * (all.bias_dtype == Dtype::f32 ? 4 : 2);
  if (all.b_sum) e.b_sum = all.b_sum + first;
}

// Four bytes of an output's NaN; of int8, which has none, of the -127 that the epilogue makes of a NaN.
HOST_DEVICE constexpr uint32_t nan_word(Dtype output) {
  return output == Dtype::f32    ? 0x7fffffff
         : output == Dtype::i8   ? 0x81818181
         : output == Dtype::e4m3 ? 0x7f7f7f7f
                                 : 0x7fff7fff;
}

}  // namespace forwardpass

KERNEL_LIBRARY forwardpass::KernelSelector forwardpass_select_gemm;
KERNEL_LIBRARY int forwardpass_gemm(const forwardpass::GemmParams* p, void* stream);
