#pragma once
// What a GEMM's kernel says about itself: a row of the tables that select.cpp selects from.
#include <cuda_runtime.h>

#include "kernels/registry.h"
#include "params/gemm.h"

namespace forwardpass {

// Two blocks of a cluster have neighbouring tiles and share an operand: along M the rows of b, along N those of a.
enum class Cluster { none, along_m, along_n };

// The largest shape that a kernel computes. Of all experts' rows and columns if it is grouped.
struct GemmLimits {
  int32_t experts = 0;  // 0: it is not grouped
  // Rows of an operand are coordinates of 32 bits, to TMA and in a list of experts; so are bytes of K, of 16-bit x too.
  int64_t rows = (int64_t{1} << 31) - 1, columns = (int64_t{1} << 31) - 1, k = (int64_t{1} << 30) - 1;
  int64_t tiles = (int64_t{1} << 31) - 1;  // blocks of a grid, or tiles that persistent blocks count
};

// Which windows of images a convolution's kernel takes as a's rows.
struct WindowLimits {
  int32_t tap_channels = 1;  // the channels of a tap are padded to a multiple, by zeros
  int32_t side = kMostKernelSide;
  // Of a step; of the bounding box's corners, which are the padding and what is left of it; of a tap's distance from
  // the first one.
  int32_t stride = INT32_MAX, corner = INT32_MAX, offset = INT32_MAX;
};

struct GemmKernel {
  Arch arch;
  int32_t tile_m, tile_n;  // of the output; no two kernels of a kind for an architecture have the same, grouped or not
  GemmKind kind;
  GemmLimits limits = {};
  // The least K of a split. modelled on an H100, against 512: int8 16 x 1024 x 1024, in tiles of 128 rows, takes 1.68
  // us instead of 2.24
  int64_t least_k = 256;
  Cluster cluster = Cluster::none;  // a kernel with clusters is persistent: one block per multiprocessor
  int32_t stage_clocks = 0;         // that a tile takes for 128 of K, modelled; 0: as its columns
  bool quantizes = false;           // it can quantise outputs in groups of 128 columns that a tile holds whole
  bool gated_blocks = true;         // it takes block scales of b where gates and ups alternate
  WindowLimits windows = {};        // of a convolution's
  bool cluster_sums = false;        // it can add the splits of K in a cluster
  int32_t blocks_per_sm = 1;        // of a grouped one, which is persistent
  cudaError_t (*launch)(const GemmParams& p, cudaStream_t stream);
  // With clusters: how many of `size` blocks run at once.
  cudaError_t (*resident_clusters)(const Device& device, int size, int& count) = nullptr;
};

using GemmKernels = Registered<GemmParams, GemmKernel>;

}  // namespace forwardpass
