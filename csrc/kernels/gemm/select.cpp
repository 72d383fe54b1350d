// The GEMMs' entry points: the selection of a kernel for a shape, with its tiles and split-K, and the launch.
#include <algorithm>

#include "kernels/gemm/kernel.h"

namespace forwardpass {
namespace {

// Rows of a tile for which the tensor cores bind. Below, the weight's bytes do (64 rows do 128 operations per byte; an
// A100 does 312 per byte of its memory's bandwidth, an L40S 850, an H100 590; unmeasured).
constexpr int kBoundByTensorCores = 128;

int64_t products_of(const GemmShape& s) { return std::max(s.experts, 1); }

// Whether a kernel computes this shape. An expert's last tile may be ragged.
bool is_within(const GemmLimits& most, const GemmKernel& k, const GemmShape& s) {
  if ((s.experts > 0) != (most.experts > 0) || s.experts > most.experts) return false;
  const int64_t rows = s.m * products_of(s), columns = s.n * products_of(s),
                tile_rows = s.experts ? rows / k.tile_m + s.experts : ceil_div(rows, k.tile_m);
  return rows <= most.rows && columns <= most.columns && s.k <= most.k &&
         tile_rows * ceil_div(s.n, k.tile_n) <= most.tiles;
}

// Whether a kernel has a convolution's windows. No more than half of its products may be with the zeros that pad a
// tap's channels: up to there wgmma takes no longer than mma.sync, which pads none and has half of its rate.
bool has_windows(const WindowLimits& most, const Conv2dShape& s) {
  const int64_t across = (s.kernel_w - 1) * s.dilation_w, down = (s.kernel_h - 1) * s.dilation_h;
  return std::max(s.kernel_h, s.kernel_w) <= most.side && std::max(s.stride_h, s.stride_w) <= most.stride &&
         std::max({s.padding_h, s.padding_w, down - s.padding_h, across - s.padding_w}) <= most.corner &&
         std::max(down, across) <= most.offset &&
         ceil_div(s.channels, most.tap_channels) * most.tap_channels <= 2 * s.channels;
}

// K, as a kernel goes through it.
int64_t depth_of(const GemmKernel& k, const GemmShape& s) {
  if (!s.windows) return s.k;
  const Conv2dShape& w = *s.windows;
  return w.kernel_h * w.kernel_w * ceil_div(w.channels, k.windows.tap_channels) * k.windows.tap_channels;
}

// A kernel's time, relative to others': rounds of tiles over the multiprocessors, times what a tile takes. Its epilogue
// is about ten clocks for 128 outputs on an H100 (modelled).
int64_t relative_time(const GemmKernel& k, const GemmShape& s, const Device& d) {
  const int64_t outputs = k.tile_m * k.tile_n, stage = k.stage_clocks ? k.stage_clocks : outputs / 32,
                tile = ceil_div(depth_of(k, s), kScaleBlock) * stage + outputs * 10 / 128;
  return ceil_div(products_of(s) * ceil_div(s.m, k.tile_m) * ceil_div(s.n, k.tile_n), d.sms) * tile;
}

// Whether a is preferred to b.
bool preferred(const GemmKernel& a, const GemmKernel& b, const GemmShape& s, const Device& d) {
  // Of a convolution 9.0 has tiles of 128 rows alone, and 64 on mma.sync.
  if (s.windows && a.arch.number != b.arch.number) return a.arch.number > b.arch.number;
  // The tile with the fewest rows that hold M or, if none does, one for which the tensor cores bind. A tile's rows of a
  // go through shared memory even if they are zeros: modelled on an H100, int8 16 x 1024 x 1024 takes 1.68 us in tiles
  // of 128 rows, 0.58 in tiles of 16.
  const int rows_a = std::min(a.tile_m, kBoundByTensorCores), rows_b = std::min(b.tile_m, kBoundByTensorCores);
  if (rows_a != rows_b) return std::min(rows_a, rows_b) >= s.m ? rows_a < rows_b : rows_a > rows_b;
  if (a.arch.number != b.arch.number) return a.arch.number > b.arch.number;
  // 128 x 256 reads 48 bytes a clock from L2, 32 in clusters of two; 128 x 128 reads 64 or 48. But of large tiles there
  // are fewer, and their last round may leave more of the multiprocessors idle: fp8 4096 x 24576 x 1536 in 24 rounds of
  // 256 columns, or in 47 of 128, which are fewer columns and 11 % slower.
  const int64_t of_a = relative_time(a, s, d), of_b = relative_time(b, s, d);
  return of_a != of_b ? of_a < of_b : a.tile_m * a.tile_n > b.tile_m * b.tile_n;
}

KernelChoice cut_up(const GemmKernel& kernel, const GemmShape& s, const Device& d) {
  KernelChoice c{};
  c.kernel = &kernel;
  c.arch = d.arch;
  c.quantizes = s.group && kernel.quantizes && kernel.tile_n >= s.group;
  if (s.experts) {  // how many tiles there are only the device knows
    // An expert's last tile may be alone in its cluster: half a tile of each, on average.
    c.cluster = kernel.cluster != Cluster::none && s.m >= 16 * kernel.tile_m ? 2 : 1;
    c.splits = 1, c.split_k = s.k;
    c.blocks = d.sms * kernel.blocks_per_sm;
    return c;
  }
  const int64_t rows = ceil_div(s.m, kernel.tile_m), columns = ceil_div(s.n, kernel.tile_n);
  if (kernel.cluster != Cluster::none) {
    // With an odd number of tiles one block of each last cluster has no work; from 16 tiles on that costs less than the
    // bytes that sharing saves.
    const int64_t along = kernel.cluster == Cluster::along_m ? rows : columns;
    c.cluster = along % 2 == 0 || along > 16 ? 2 : 1;
    c.blocks = d.sms;
  }
  // Split-K: fewer tiles than multiprocessors leave memory bandwidth unused, so there are as many splits as fill them
  // once. Partial sums in the workspace, 8 bytes per output and split, stay in L2; at 16 rows they are half of the
  // weight's bytes.
  const int64_t depth = depth_of(kernel, s),
                most_splits = std::min(std::max<int64_t>(depth / kernel.least_k, 1), int64_t{16});
  c.splits = std::min(std::max<int64_t>(d.sms / (rows * columns), 1), most_splits);
  c.split_k = ceil_div(ceil_div(depth, c.splits), kScaleBlock) * kScaleBlock;
  c.splits = ceil_div(depth, c.split_k);
  c.cluster_sums = kernel.cluster_sums && c.splits > 1 && c.splits <= kClusterBlocks;
  if (c.cluster_sums && c.cluster * c.splits > kClusterBlocks) c.cluster = 1;
  return c;
}

// The blocks of a cluster are in one GPC, so how many clusters run at once depends on which multiprocessors a GPU has
// left, and a MIG slice may have no place for any. A choice that asks for more takes the variant with the same bits.
cudaError_t place(const GemmShape& s, const Device& d, KernelChoice& c) {
  int resident = 0;
  if (c.cluster_sums) {
    if (auto e = c.kernel->resident_clusters(d, static_cast<int>(c.cluster * c.splits), resident)) return e;
    const int64_t rows = ceil_div(s.m, c.kernel->tile_m), columns = ceil_div(s.n, c.kernel->tile_n);
    const bool along_m = c.kernel->cluster == Cluster::along_m;
    const int64_t clusters = ceil_div(along_m ? rows : columns, c.cluster) * (along_m ? columns : rows);
    if (clusters <= resident) return cudaSuccess;  // a second round would take as long as the first
    c.cluster_sums = false;
  }
  if (c.cluster > 1) {
    if (auto e = c.kernel->resident_clusters(d, c.cluster, resident)) return e;
    if (resident) {
      c.blocks = resident * c.cluster;
    } else {
      c.cluster = 1;
    }
  }
  return cudaSuccess;
}

// The kernel that is preferred among those that run this shape. quantizes: those alone that quantise its groups.
cudaError_t best_of(const GemmKernel*& best, bool quantizes, const GemmShape& s, const Device& d) {
  bool is_any = false;
  GemmKernels::for_each([&](const GemmKernel& k) {
    if (k.kind != s.kind || !runs_on(k.arch, d)) return;
    is_any = true;
    if ((quantizes && !(k.quantizes && k.tile_n >= s.group)) || (s.gated_blocks && !k.gated_blocks)) return;
    if (s.windows && !has_windows(k.windows, *s.windows)) return;
    if (is_within(k.limits, k, s) && (!best || preferred(k, *best, s, d))) best = &k;
  });
  return best ? cudaSuccess : is_any ? static_cast<cudaError_t>(kBeyondEveryKernel) : cudaErrorNoKernelImageForDevice;
}

cudaError_t select(const GemmShape& s, const Device& d, KernelChoice& choice) {
  const GemmKernel* best = nullptr;
  cudaError_t error = cudaErrorNoKernelImageForDevice;
  if (s.group && s.m > kGemvRows) error = best_of(best, true, s, d);
  if (!best) error = best_of(best, false, s, d);
  if (error) return error;
  choice = cut_up(*best, s, d);
  return place(s, d, choice);
}

}  // namespace
}  // namespace forwardpass

using namespace forwardpass;

int forwardpass_select_gemm(const GemmShape* shape, const Device* device, KernelChoice* choice) {
  return select(*shape, *device, *choice);
}
// Row `index` of all tables, null behind the last, and whether it computes a shape: for tests of every row at its
// limits.
KERNEL_LIBRARY const GemmKernel* forwardpass_gemm_row(int index, const GemmShape* shape, int* within) {
  const GemmKernel* row = nullptr;
  GemmKernels::for_each([&](const GemmKernel& k) {
    if (index-- == 0) row = &k;
  });
  if (row) *within = is_within(row->limits, *row, *shape);
  return row;
}
int forwardpass_gemm(const GemmParams* p, void* stream) {
  return p->choice.kernel->launch(*p, static_cast<cudaStream_t>(stream));
}
