#pragma once
// From a warp's accumulators, fragments of the tensor cores, to outputs. Sixteen rows by 32 columns at a time go
// through the warp's staging buffer in shared memory, in which a lane finds eight columns of a row, as the epilogue
// takes them. That is 4 bytes of shared memory per output, written and read: 3 % of the time of a tile with K = 4096 on
// an A100. In exchange there is one epilogue, its code exists once in a kernel, and stores are of whole sectors.
#include <utility>

#include "device/epilogue.cuh"
#include "params/dequant_activation.h"
#include "params/gemm.h"

namespace forwardpass {

constexpr int kStagingRows = 16, kStagingColumns = 32;

// The staging buffer. Rows are 40 words apart, and swizzled: in odd rows the halves of each eight words are exchanged,
// in the second four of each eight rows the eights of each sixteen. So fragments (two words per lane, eight rows),
// transposed fragments (one word per lane, eight rows by eight) and half vectors (four words per lane, eight rows by
// four) are all free of bank conflicts.
struct Staging {
  uint32_t word[kStagingRows][kStagingColumns + 8];

  template <class T>
  __device__ T& at(int row, int column) {
    return reinterpret_cast<T&>(word[row][swizzled(row, column)]);
  }
  template <class T>
  __device__ const T& at(int row, int column) const {
    return reinterpret_cast<const T&>(word[row][swizzled(row, column)]);
  }

 private:
  __device__ static int swizzled(int row, int column) { return column ^ (row & 1) * 4 ^ (row & 4) * 2; }
};

// f(std::integral_constant) of a run-time index that is the same for all threads: registers cannot be indexed at run
// time.
template <class F, int... I>
__device__ inline void at_index(int index, F f, std::integer_sequence<int, I...>) {
  (void)((index == I && (f(std::integral_constant<int, I>{}), true)) || ...);
}

// Where a GEMM kernel stores: to the epilogue's output or, with split-K, as partial sums.
struct GemmOutput {
  Epilogue epilogue;
  EpilogueAccess access;
  int64_t rows, columns;
  void* partial;
  int64_t partial_stride, split_stride;

  explicit GemmOutput(const GemmParams& p)
      : epilogue(p.epilogue),
        access(p.epilogue),
        rows(p.a.rows),
        columns(p.b.rows),
        partial(p.partial),
        partial_stride(p.partial_stride),
        split_stride(p.a.rows * p.partial_stride) {}
  // how many of the staging buffer's rows, which begin at `row`, are inside the output
  __device__ int staging_rows(int64_t row) const { return static_cast<int>(min(int64_t{kStagingRows}, rows - row)); }
};

// Stages an n8 tile of a fragment: c0 and c1 are in row lane / 4, c2 and c3 eight rows below.
template <class Acc>
__device__ inline void put_fragment(Staging& staging, int tile, const Acc (&c)[4]) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = tile * 8 + lane % 4 * 2;
  struct alignas(8) Pair {
    Acc a, b;
  };
  staging.at<Pair>(row, column) = {c[0], c[1]};
  staging.at<Pair>(row + 8, column) = {c[2], c[3]};
}

// The same of transposed accumulators: the staging buffer's rows from `row` on are the fragment's columns.
template <class Acc>
__device__ inline void put_transposed(Staging& staging, int row, int column, const Acc (&c)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e) staging.at<Acc>(row + lane % 4 * 2 + e % 2, column + lane / 4 + e / 2 * 8) = c[e];
}

template <class Acc>
__device__ inline Vec<Acc> get_vector(const Staging& staging, int row, int column) {
  struct alignas(16) Half {
    Acc e[4];
  };
  const Half half[2] = {staging.at<Half>(row, column), staging.at<Half>(row, column + 4)};
  Vec<Acc> v;
#pragma unroll
  for (int i = 0; i < kVec; ++i) v.e[i] = half[i / 4].e[i % 4];
  return v;
}

// Finishes the first kColumns columns of the staging buffer, whose first element is (row, column) of the output: stores
// partial sums, or calls store(y, row, column of the output, n) with eight values, n of them inside. A lane has the
// same columns in all rows. kBeside: the buffer holds that many blocks of kColumns columns; each is of the next sixteen
// rows of the output.
template <int kColumns, class Acc, int kBeside = 1, class Store>
__device__ inline void finish_staged(const Staging& staging, const GemmOutput& o, int64_t row, int64_t column,
                                     int split, Store store) {
  static_assert(kColumns * kBeside <= kStagingColumns);
  const int lane = threadIdx.x % 32;
  if (o.partial) {  // in the workspace, padded and aligned; lanes side by side store whole sectors
    constexpr int kFours = kColumns * kBeside / 4;
    const int c = lane % kFours * 4;
    row += c / kColumns * kStagingRows, column += c % kColumns;
    if (column >= o.columns) return;
    const int rows = o.staging_rows(row);
    auto p = static_cast<uint32_t*>(o.partial) + split * o.split_stride + row * o.partial_stride + column;
#pragma unroll 1
    for (int r = lane / kFours; r < rows; r += 32 / kFours)
      *reinterpret_cast<uint4*>(p + r * o.partial_stride) = staging.at<uint4>(r, c);
    return;
  }
  const bool gated = is_gated(o.epilogue.activation);
  const int width = gated ? 2 * kVec : kVec, vectors = kColumns * kBeside / width, c = lane % vectors * width;
  row += c / kColumns * kStagingRows, column += c % kColumns;
  if (column >= o.columns) return;
  const int n = static_cast<int>(min(int64_t{kVec}, o.columns - column)), rows = o.staging_rows(row);
  const EpilogueColumns<Acc> columns(o.epilogue, o.access, column, n);
#pragma unroll 1
  for (int r = lane / vectors; r < rows; r += 32 / vectors) {
    const Vec<Acc> acc = get_vector<Acc>(staging, r, c);
    float y[kVec];
    epilogue_values(
        y, o.epilogue, o.access, [&] { return columns; }, row + r, column, n, acc,
        gated ? get_vector<Acc>(staging, r, c + kVec) : acc);
    store(y, row + r, gated ? column / 2 : column, n);
  }
}
template <int kColumns, class Acc, int kBeside = 1>
__device__ inline void finish_staged(const Staging& staging, const GemmOutput& o, int64_t row, int64_t column,
                                     int split) {
  finish_staged<kColumns, Acc, kBeside>(
      staging, o, row, column, split,
      [&](float (&y)[kVec], int64_t r, int64_t c, int n) { store_output(y, o.epilogue, o.access, r, c, n); });
}

// Stages and finishes a warp's accumulators: kRows blocks of sixteen rows, kStep rows apart, by kTiles n8 tiles, from
// (row, column) of the output on. finish is finish_staged, or what a kernel does in its place.
template <int kStep, int kRows, int kTiles, class Acc, class Finish>
__device__ inline void for_each_staged(const Acc (&acc)[kRows][kTiles][4], Staging& staging, int64_t row,
                                       int64_t column, Finish finish) {
  constexpr int kStagingTiles = kTiles % 4 == 0 ? 4 : 2, kColumns = kStagingTiles * 8, kAcross = kTiles / kStagingTiles;
  static_assert(kTiles % kStagingTiles == 0 && kColumns <= kStagingColumns);
#pragma unroll 1
  for (int chunk = 0; chunk < kRows * kAcross; ++chunk) {
    at_index(
        chunk,
        [&](auto constant) {
          constexpr int kRow = decltype(constant)::value / kAcross, kColumn = decltype(constant)::value % kAcross;
#pragma unroll
          for (int t = 0; t < kStagingTiles; ++t) put_fragment(staging, t, acc[kRow][kColumn * kStagingTiles + t]);
        },
        std::make_integer_sequence<int, kRows * kAcross>{});
    __syncwarp();
    finish(std::integral_constant<int, kColumns>{}, row + chunk / kAcross * kStep, column + chunk % kAcross * kColumns);
    __syncwarp();
  }
}
template <int kRows, int kTiles, class Acc>
__device__ inline void finish_fragments(const Acc (&acc)[kRows][kTiles][4], Staging& staging, const GemmOutput& o,
                                        int64_t row, int64_t column, int split) {
  for_each_staged<kStagingRows>(acc, staging, row, column, [&](auto columns, int64_t r, int64_t c) {
    finish_staged<decltype(columns)::value, Acc>(staging, o, r, c, split);
  });
}

// The same of transposed accumulators: kTilesN blocks of sixteen columns of the output by kTilesM n8 tiles of its rows.
template <int kTilesN, int kTilesM, class Acc>
__device__ inline void finish_transposed(const Acc (&acc)[kTilesN][kTilesM][4], Staging& staging, const GemmOutput& o,
                                         int64_t row, int64_t column, int split) {
  constexpr int kColumns = kTilesN * 16, kFit = kStagingColumns / kColumns,
                kBeside = kFit < kTilesM / 2 ? kFit : kTilesM / 2;
  static_assert(kTilesM % (2 * kBeside) == 0);
#pragma unroll 1
  for (int chunk = 0; chunk < kTilesM / 2; chunk += kBeside) {
    at_index(
        chunk / kBeside,
        [&](auto constant) {
#pragma unroll
          for (int i = 0; i < kTilesN; ++i)
#pragma unroll
            for (int j = 0; j < 2 * kBeside; ++j)
              put_transposed(staging, j % 2 * 8, j / 2 * kColumns + i * 16,
                             acc[i][decltype(constant)::value * 2 * kBeside + j]);
        },
        std::make_integer_sequence<int, kTilesM / 2 / kBeside>{});
    __syncwarp();
    finish_staged<kColumns, Acc, kBeside>(staging, o, row + chunk * kStagingRows, column, split);
    __syncwarp();
  }
}

// In dequant_activation_sm80.cu: each accumulator is the sum of `splits` parts, split_stride elements apart.
cudaError_t launch_dequant_activation(const DequantActivationParams& p, int64_t splits, int64_t split_stride,
                                      cudaStream_t stream);

// After a GEMM with split-K: reduces the partial sums and runs the epilogue.
inline cudaError_t reduce_split_k(const GemmParams& p, Dtype acc, cudaStream_t stream) {
  if (!p.partial) return cudaSuccess;
  const Matrix sums{p.partial, acc, p.a.rows, p.b.rows, p.partial_stride};
  return launch_dequant_activation({sums, p.epilogue}, p.choice.splits, p.a.rows * p.partial_stride, stream);
}

}  // namespace forwardpass
