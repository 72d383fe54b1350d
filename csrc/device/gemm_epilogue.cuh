#pragma once
// From a warp's accumulators, fragments of the tensor cores, to outputs. Sixteen rows by 32 columns at a time go
// through the warp's staging buffer in shared memory, in which a lane finds eight columns of a row, as the epilogue
// takes them: the general epilogue, of every option and of transposed fragments. Its code exists once in a kernel, and
// stores are of whole sectors. What most products need is in fragment_epilogue.cuh.
#include <utility>

#include "device/epilogue.cuh"
#include "device/fragments.cuh"
#include "params/dequant_activation.h"
#include "params/gemm.h"
#include "schedule/gemm_tile.cuh"

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

// f(std::integral_constant) of a run-time index that is the same for all threads: registers cannot be indexed at run
// time. The last index is not tested: on a path past all of them what f writes would be alive from the kernel's
// beginning on (900 bytes of spills).
template <class F, int... I>
__device__ inline void at_index(int index, F f, std::integer_sequence<int, I...>) {
  (void)(((index == I || I == sizeof...(I) - 1) && (f(std::integral_constant<int, I>{}), true)) || ...);
}

// Where a GEMM kernel stores: to the epilogue's output or, with split-K, as partial sums.
struct GemmOutput {
  Epilogue epilogue;
  EpilogueAccess access;
  bool direct;  // the outputs are made in the fragments' layout (fragment_epilogue.cuh)
  bool plain;   // there is nothing to multiply by or to add: block scales are in the accumulators already
  int64_t rows, columns;
  void* partial;
  int64_t partial_stride, split_stride;

  explicit GemmOutput(const GemmParams& p)
      : epilogue(p.epilogue),
        access(p.epilogue),
        direct(p.choice.splits == 1 && !p.epilogue.zero_point &&
               (size_of(p.epilogue.out_dtype) == 2 || p.epilogue.group_scale)),
        plain(!p.epilogue.a_scale && !p.epilogue.b_scale && !p.epilogue.bias),
        rows(p.a.rows),
        columns(p.columns()),
        partial(p.partial),
        partial_stride(p.partial_stride),
        split_stride(p.a.rows * p.partial_stride) {
    // What an expert has begins anywhere.
    if (p.groups.ends) access.columns = access.columns && columns % kVec == 0;
  }
  // how many of the staging buffer's rows, which begin at `row`, are inside the output
  __device__ int staging_rows(int64_t row) const { return static_cast<int>(min(int64_t{kStagingRows}, rows - row)); }
};

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

// Finishes the first kColumns columns of the staging buffer, whose first element is (row, column) of the output: stores
// partial sums, or outputs. A lane has the same columns in all rows. kBeside: the buffer holds that many blocks of
// kColumns columns; each is of the next sixteen rows of the output.
template <int kColumns, class Acc, int kBeside = 1>
__device__ inline void finish_staged(const Staging& staging, const GemmOutput& o, int64_t row, int64_t column,
                                     int split) {
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
    store_output(y, o.epilogue, o.access, row + r, gated ? column / 2 : column, n);
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
    at_index(
        chunk,
        [&](auto constant) {
          constexpr int kRow = decltype(constant)::value / kAcross, kColumn = decltype(constant)::value % kAcross;
#pragma unroll
          for (int t = 0; t < kStagingTiles; ++t)
            stage_accumulators(staging, 0, t * 8, acc[kRow][kColumn * kStagingTiles + t]);
        },
        std::make_integer_sequence<int, kTilesM * kAcross>{});
    __syncwarp();
    finish_staged<kColumns, Acc>(staging, o, row + chunk / kAcross * kStepM, column + chunk % kAcross * kColumns,
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

// Of accumulators whose rows are the output's columns. kSwapAB: so it is with the tile's.
template <bool kSwapAB>
struct TransposedEpilogue : WarpEpilogue<Staging> {
  using WarpEpilogue::WarpEpilogue;
  __device__ void begin(const GemmTile&, int, int) const {}  // as FragmentEpilogue has it

  template <class Acc, int kTilesN, int kTilesM, int kStepN>
  __device__ void operator()(const Fragments<Acc, kTilesN, kTilesM, kStepN>& acc, const GemmTile& tile, int row,
                             int column) const {
    static_assert(kTilesN == 1 || kStepN == 16);
    constexpr int kColumns = kTilesN * 16, kFit = kStagingColumns / kColumns,
                  kBeside = kFit < kTilesM / 2 ? kFit : kTilesM / 2;
    static_assert(kTilesM % (2 * kBeside) == 0);
    const int64_t tile_row = tile.row + row, tile_column = tile.column + column;
    const int64_t out_row = kSwapAB ? tile_column : tile_row, out_column = kSwapAB ? tile_row : tile_column;
#pragma unroll 1
    for (int chunk = 0; chunk < kTilesM / 2; chunk += kBeside) {
      at_index(
          chunk / kBeside,
          [&](auto constant) {
#pragma unroll
            for (int i = 0; i < kTilesN; ++i)
#pragma unroll
              for (int j = 0; j < 2 * kBeside; ++j)
                stage_transposed(*staging, j % 2 * 8, j / 2 * kColumns + i * 16,
                                 acc[i][decltype(constant)::value * 2 * kBeside + j]);
          },
          std::make_integer_sequence<int, kTilesM / 2 / kBeside>{});
      __syncwarp();
      finish_staged<kColumns, Acc, kBeside>(*staging, out, out_row + chunk * kStagingRows, out_column, tile.split);
      __syncwarp();
    }
  }
};

// The same where stages are loaded ahead, behind which the epilogue's own loads from DRAM would wait. So a byte of each
// sector that it needs is read as the tile begins, and is in a cache then: modelled on an H100, 16 rows of each of 8
// experts by 7168 x 2048 with scales of rows take 45.7 us, else 49.9.
template <bool kSwapAB>
struct CachedEpilogue : TransposedEpilogue<kSwapAB> {
  using Base = TransposedEpilogue<kSwapAB>;
  using Base::Base;
  uint32_t read = 0;

  // By 16 lanes the scales of 64 rows, by 8 those of the warp's 16 columns, by 8 their biases.
  __device__ void begin(const GemmTile& tile, int row, int column) {
    const Epilogue& e = this->out.epilogue;
    const int lane = threadIdx.x % 32;
    const int64_t first_row = tile.row + row, first_column = tile.column + column,
                  out_row = (kSwapAB ? first_column : first_row) + lane % 16 * 4,
                  out_column = (kSwapAB ? first_row : first_column) + lane % 8 * 2;
    const void* p = nullptr;
    if (lane < 16) {
      if (e.a_scale_per_row && out_row < this->out.rows) p = e.a_scale + out_row;
    } else if (out_column < this->out.columns) {
      if (lane >= 24) {
        if (e.bias) p = static_cast<const char*>(e.bias) + out_column * (e.bias_dtype == Dtype::f32 ? 4 : 2);
      } else if (e.b_scale_per_column) {
        p = e.b_scale + out_column;
      }
    }
    if (p) read = *static_cast<const volatile uint8_t*>(p);
  }
  template <class Accumulators>
  __device__ void operator()(const Accumulators& acc, const GemmTile& tile, int row, int column) const {
    ptx::unknown(static_cast<int32_t>(read));  // its register is free from here on: nothing waits for the byte before
    Base::operator()(acc, tile, row, column);
  }
};

// In dequant_activation_sm80.cu: each accumulator is the sum of `splits` parts, split_stride elements apart. arch: of
// the device, where the launch may be a dependent one.
cudaError_t launch_dequant_activation(const DequantActivationParams& p, int64_t splits, int64_t split_stride,
                                      cudaStream_t stream, int arch = 0);

// After a GEMM with split-K: reduces the partial sums and runs the epilogue.
inline cudaError_t reduce_split_k(const GemmParams& p, Dtype acc, cudaStream_t stream) {
  if (!p.partial) return cudaSuccess;
  const Matrix sums{p.partial, acc, p.a.rows, p.b.rows, p.partial_stride};
  return launch_dequant_activation({sums, p.epilogue}, p.choice.splits, p.a.rows * p.partial_stride, stream,
                                   p.choice.arch);
}

}  // namespace forwardpass
