#pragma once
// From the accumulators that a warp holds as fragments of the tensor cores to outputs: sixteen rows by 32 columns at a
// time go through a slab of shared memory of the warp's own, in which a lane finds eight columns of a row, as
// epilogue_vector takes them. Twice 4 bytes of shared memory an output, 3 % of the time of a tile of K = 4096 on an
// A100; in exchange there is one epilogue, its code once in a kernel, and stores of whole sectors.
#include <utility>

#include "device/epilogue.cuh"
#include "params/dequant_activation.h"
#include "params/gemm.h"

namespace forwardpass {

constexpr int kSlabRows = 16, kSlabColumns = 32;

// Rows are 40 words apart; in odd ones the halves of each eight words are exchanged, in the second four of each eight
// rows the eights of each sixteen: fragments (two words a lane, eight rows), transposed ones (a word a lane, eight rows
// by eight) and half vectors (four words a lane, eight rows by four) fall into different banks.
struct Slab {
  uint32_t word[kSlabRows][kSlabColumns + 8];

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

// f(constant) for the constant that equals index, which all threads have alike: registers have no index at run time.
template <class F, int... I>
__device__ inline void at_index(int index, F f, std::integer_sequence<int, I...>) {
  (void)((index == I && (f(std::integral_constant<int, I>{}), true)) || ...);
}

// Where a GEMM's kernel leaves its accumulators: the epilogue's output, or partial sums where the depth is split.
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
  // of a slab that begins at `row`, those inside
  __device__ int slab_rows(int64_t row) const { return static_cast<int>(min(int64_t{kSlabRows}, rows - row)); }
};

// An n8 tile of a fragment, the warp's sixteen rows: c0 and c1 in row lane / 4, c2 and c3 eight rows below.
template <class Acc>
__device__ inline void put_fragment(Slab& slab, int tile, const Acc (&c)[4]) {
  const int lane = threadIdx.x % 32, row = lane / 4, column = tile * 8 + lane % 4 * 2;
  struct alignas(8) Pair {
    Acc a, b;
  };
  slab.at<Pair>(row, column) = {c[0], c[1]};
  slab.at<Pair>(row + 8, column) = {c[2], c[3]};
}

// The same of a product made transposed: the slab's rows from `row` on are the fragment's columns.
template <class Acc>
__device__ inline void put_transposed(Slab& slab, int row, int column, const Acc (&c)[4]) {
  const int lane = threadIdx.x % 32;
#pragma unroll
  for (int e = 0; e < 4; ++e) slab.at<Acc>(row + lane % 4 * 2 + e % 2, column + lane / 4 + e / 2 * 8) = c[e];
}

template <class Acc>
__device__ inline Vec<Acc> get_vector(const Slab& slab, int row, int column) {
  struct alignas(16) Half {
    Acc e[4];
  };
  const Half half[2] = {slab.at<Half>(row, column), slab.at<Half>(row, column + 4)};
  Vec<Acc> v;
#pragma unroll
  for (int i = 0; i < kVec; ++i) v.e[i] = half[i / 4].e[i % 4];
  return v;
}

// The first kColumns of what the slab holds, whose first element is (row, column) of the product: to partial sums, or
// to store(y, row, column of the output, n), eight values of which n are inside. A lane's columns are the same in all
// rows. kBeside: so many times; beside the first kColumns are those of the next sixteen rows.
template <int kColumns, class Acc, int kBeside = 1, class Store>
__device__ inline void finish_slab(const Slab& slab, const GemmOutput& o, int64_t row, int64_t column, int split,
                                   Store store) {
  static_assert(kColumns * kBeside <= kSlabColumns);
  const int lane = threadIdx.x % 32;
  if (o.partial) {  // its rows are ours, padded and aligned; by fours, lanes side by side fill sectors
    constexpr int kFours = kColumns * kBeside / 4;
    const int c = lane % kFours * 4;
    row += c / kColumns * kSlabRows, column += c % kColumns;
    if (column >= o.columns) return;
    const int rows = o.slab_rows(row);
    auto p = static_cast<uint32_t*>(o.partial) + split * o.split_stride + row * o.partial_stride + column;
#pragma unroll 1
    for (int r = lane / kFours; r < rows; r += 32 / kFours)
      *reinterpret_cast<uint4*>(p + r * o.partial_stride) = slab.at<uint4>(r, c);
    return;
  }
  const bool gated = is_gated(o.epilogue.activation);
  const int width = gated ? 2 * kVec : kVec, vectors = kColumns * kBeside / width, c = lane % vectors * width;
  row += c / kColumns * kSlabRows, column += c % kColumns;
  if (column >= o.columns) return;
  const int n = static_cast<int>(min(int64_t{kVec}, o.columns - column)), rows = o.slab_rows(row);
  const EpilogueColumns<Acc> columns(o.epilogue, o.access, column, n);
#pragma unroll 1
  for (int r = lane / vectors; r < rows; r += 32 / vectors) {
    const Vec<Acc> acc = get_vector<Acc>(slab, r, c);
    float y[kVec];
    epilogue_values(
        y, o.epilogue, o.access, [&] { return columns; }, row + r, column, n, acc,
        gated ? get_vector<Acc>(slab, r, c + kVec) : acc);
    store(y, row + r, gated ? column / 2 : column, n);
  }
}
template <int kColumns, class Acc, int kBeside = 1>
__device__ inline void finish_slab(const Slab& slab, const GemmOutput& o, int64_t row, int64_t column, int split) {
  finish_slab<kColumns, Acc, kBeside>(slab, o, row, column, split, [&](float (&y)[kVec], int64_t r, int64_t c, int n) {
    store_output(y, o.epilogue, o.access, r, c, n);
  });
}

// The accumulators of a warp: kRows blocks of sixteen rows, kStep rows apart, by kTiles n8 tiles, from (row, column) of
// the product on. Finish is finish_slab, or what it does in its place.
template <int kStep, int kRows, int kTiles, class Acc, class Finish>
__device__ inline void each_slab(const Acc (&acc)[kRows][kTiles][4], Slab& slab, int64_t row, int64_t column,
                                 Finish finish) {
  constexpr int kSlabTiles = kTiles % 4 == 0 ? 4 : 2, kColumns = kSlabTiles * 8, kAcross = kTiles / kSlabTiles;
  static_assert(kTiles % kSlabTiles == 0 && kColumns <= kSlabColumns);
#pragma unroll 1
  for (int chunk = 0; chunk < kRows * kAcross; ++chunk) {
    at_index(
        chunk,
        [&](auto constant) {
          constexpr int kRow = decltype(constant)::value / kAcross, kColumn = decltype(constant)::value % kAcross;
#pragma unroll
          for (int t = 0; t < kSlabTiles; ++t) put_fragment(slab, t, acc[kRow][kColumn * kSlabTiles + t]);
        },
        std::make_integer_sequence<int, kRows * kAcross>{});
    __syncwarp();
    finish(std::integral_constant<int, kColumns>{}, row + chunk / kAcross * kStep, column + chunk % kAcross * kColumns);
    __syncwarp();
  }
}
template <int kRows, int kTiles, class Acc>
__device__ inline void finish_fragments(const Acc (&acc)[kRows][kTiles][4], Slab& slab, const GemmOutput& o,
                                        int64_t row, int64_t column, int split) {
  each_slab<kSlabRows>(acc, slab, row, column, [&](auto columns, int64_t r, int64_t c) {
    finish_slab<decltype(columns)::value, Acc>(slab, o, r, c, split);
  });
}

// The same of a product made transposed: kTilesN blocks of sixteen columns of the product by kTilesM n8 tiles of its
// rows.
template <int kTilesN, int kTilesM, class Acc>
__device__ inline void finish_transposed(const Acc (&acc)[kTilesN][kTilesM][4], Slab& slab, const GemmOutput& o,
                                         int64_t row, int64_t column, int split) {
  constexpr int kColumns = kTilesN * 16, kFit = kSlabColumns / kColumns,
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
              put_transposed(slab, j % 2 * 8, j / 2 * kColumns + i * 16,
                             acc[i][decltype(constant)::value * 2 * kBeside + j]);
        },
        std::make_integer_sequence<int, kTilesM / 2 / kBeside>{});
    __syncwarp();
    finish_slab<kColumns, Acc, kBeside>(slab, o, row + chunk * kSlabRows, column, split);
    __syncwarp();
  }
}

// Of dequant_activation_sm80.cu: each accumulator is the sum of `splits` parts, split_stride elements apart.
cudaError_t launch_dequant_activation(const DequantActivationParams& p, int64_t splits, int64_t split_stride,
                                      cudaStream_t stream);

// After a GEMM: its partial sums, where it has any, to the output.
inline cudaError_t finish_splits(const GemmParams& p, Dtype acc, cudaStream_t stream) {
  if (!p.partial) return cudaSuccess;
  const Matrix sums{p.partial, acc, p.a.rows, p.b.rows, p.partial_stride};
  return launch_dequant_activation({sums, p.epilogue}, p.choice.splits, p.a.rows * p.partial_stride, stream);
}

}  // namespace forwardpass
