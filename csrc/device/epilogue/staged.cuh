#pragma once
// The general epilogue of a warp's accumulators, fragments of the tensor cores: it has every option, and takes
// transposed fragments too. Sixteen rows by 32 columns at a time go through the warp's staging buffer in shared memory,
// in which a lane finds eight columns of a row (vector8.cuh). Its code exists once in a kernel, and stores are of whole
// sectors. What most products need is in fragment.cuh.
#include <utility>

#include "device/epilogue/output.cuh"
#include "device/fragments.cuh"

namespace forwardpass {

constexpr int kStagingRows = 16, kStagingColumns = 32;

// Accumulators in shared memory. Rows are eight words more than a multiple of 32 apart, and swizzled: in odd rows the
// halves of each eight words are exchanged, in the second four of each eight rows the eights of each sixteen. So
// fragments (two words per lane, eight rows), transposed fragments (one word per lane, eight rows by eight) and half
// vectors (four words per lane, eight rows by four) are all free of bank conflicts.
template <int kRows, int kColumns>
struct StagedTile {
  static_assert(kColumns % 32 == 0);
  uint32_t word[kRows][kColumns + 8];

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
using Staging = StagedTile<kStagingRows, kStagingColumns>;

// f(index) of a run-time index below kCount that is the same for all threads, inlined for each of its values: registers
// cannot be indexed at run time. The last index is not tested: on a path past all of them what f writes would be alive
// from the kernel's beginning on (900 bytes of spills).
template <class F, int... I>
__device__ inline void at_index(int index, F f, std::integer_sequence<int, I...>) {
  (void)(((index == I || I == sizeof...(I) - 1) && (f(I), true)) || ...);
}
template <int kCount, class F>
__device__ inline void at_index(int index, F f) {
  at_index(index, f, std::make_integer_sequence<int, kCount>{});
}

// Stages an accumulator tile at (row, column) of a buffer.
template <class Acc, class Tile>
__device__ inline void stage_accumulators(Tile& staging, int row, int column, const Acc (&c)[4]) {
  struct alignas(8) Pair {
    Acc a, b;
  };
#pragma unroll
  for (int e = 0; e < 4; e += 2)
    staging.template at<Pair>(row + accumulator_row(e), column + accumulator_column(e)) = {c[e], c[e + 1]};
}

// The same of transposed accumulators: the buffer's rows from `row` on are the tile's columns.
template <class Acc, class Tile>
__device__ inline void stage_transposed(Tile& staging, int row, int column, const Acc (&c)[4]) {
#pragma unroll
  for (int e = 0; e < 4; ++e) staging.template at<Acc>(row + accumulator_column(e), column + accumulator_row(e)) = c[e];
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

// How many of the staging buffer's rows, which begin at `row`, are inside the output.
__device__ inline int staged_rows(const GemmOutput& o, int64_t row) {
  return static_cast<int>(min(int64_t{kStagingRows}, o.rows - row));
}

// Partial sums to the workspace, padded and aligned; lanes side by side store whole sectors.
template <int kColumns, int kBeside>
__device__ inline void store_partial(const Staging& staging, const GemmOutput& o, int64_t row, int64_t column,
                                     int split) {
  constexpr int kFours = kColumns * kBeside / 4;
  const int lane = threadIdx.x % 32, c = lane % kFours * 4;
  row += c / kColumns * kStagingRows, column += c % kColumns;
  if (column >= o.columns) return;
  const int rows = staged_rows(o, row);
  auto p = static_cast<uint32_t*>(o.partial) + split * o.split_stride + row * o.partial_stride + column;
#pragma unroll 1
  for (int r = lane / kFours; r < rows; r += 32 / kFours)
    *reinterpret_cast<uint4*>(p + r * o.partial_stride) = staging.at<uint4>(r, c);
}

// Finishes the first kColumns columns of the staging buffer, whose first element is (row, column) of the output: stores
// partial sums, or outputs. A lane has the same columns in all rows. kBeside: the buffer holds that many blocks of
// kColumns columns; each is of the next sixteen rows of the output.
template <int kColumns, class Acc, bool k16Bits, int kBeside = 1>
__device__ inline void finish_staged(const Staging& staging, const GemmOutput& o, int64_t row, int64_t column,
                                     int split) {
  static_assert(kColumns * kBeside <= kStagingColumns);
  if (o.partial) return store_partial<kColumns, kBeside>(staging, o, row, column, split);
  const bool gated = is_gated(o.epilogue.activation);
  const int lane = threadIdx.x % 32, width = gated ? 2 * kVec : kVec, vectors = kColumns * kBeside / width,
            c = lane % vectors * width;
  row += c / kColumns * kStagingRows, column += c % kColumns;
  if (column >= o.columns) return;
  const int n = static_cast<int>(min(int64_t{kVec}, o.columns - column)), rows = staged_rows(o, row);
  const EpilogueColumns<Acc> columns(o.epilogue, o.access, column, n);
#pragma unroll 1
  for (int r = lane / vectors; r < rows; r += 32 / vectors) {
    const Vec<Acc> acc = get_vector<Acc>(staging, r, c);
    float y[kVec];
    epilogue_values(
        y, o.epilogue, o.access, [&] { return columns; }, row + r, column, n, acc,
        gated ? get_vector<Acc>(staging, r, c + kVec) : acc);
    store_output<k16Bits>(y, o.epilogue, o.access, row + r, gated ? column / 2 : column, n);
  }
}

// Stages and finishes a warp's accumulators, sixteen rows by up to 32 columns at a time, from (row, column) of the
// output on.
template <class Acc, int kTilesM, int kTilesN, int kStepM>
__device__ inline void finish_fragments(const Fragments<Acc, kTilesM, kTilesN, kStepM>& acc, Staging& staging,
                                        const GemmOutput& o, int64_t row, int64_t column, int split) {
  constexpr int kStagingTiles = kTilesN % 4 == 0 ? 4 : 2, kColumns = kStagingTiles * 8,
                kAcross = kTilesN / kStagingTiles;
  static_assert(kTilesN % kStagingTiles == 0 && kColumns <= kStagingColumns);
#pragma unroll 1
  for (int chunk = 0; chunk < kTilesM * kAcross; ++chunk) {
    at_index<kTilesM * kAcross>(chunk, [&](int i) {
#pragma unroll
      for (int t = 0; t < kStagingTiles; ++t)
        stage_accumulators(staging, 0, t * 8, acc[i / kAcross][i % kAcross * kStagingTiles + t]);
    });
    __syncwarp();
    finish_staged<kColumns, Acc, false>(staging, o, row + chunk / kAcross * kStepM, column + chunk % kAcross * kColumns,
                                        split);
    __syncwarp();
  }
}

// A warp's epilogue: its part of the block's staging buffers, a Storage, and where the block stores.
template <class Storage_>
struct WarpEpilogue {
  using Storage = Storage_;
  Storage* staging;
  const GemmOutput& out;

  template <class SharedStorage>
  __device__ WarpEpilogue(SharedStorage& s, const GemmOutput& out) : staging(&s.staging[threadIdx.x / 32]), out(out) {}
  // The same again. Else addresses that are the same in every tile would be alive in all main loops, and spill.
  template <class SharedStorage>
  __device__ void find_staging(SharedStorage& s) {
    staging = &s.staging[ptx::unknown(threadIdx.x / 32)];
  }
};

}  // namespace forwardpass
