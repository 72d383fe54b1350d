#pragma once
// The direct epilogue of tiles that are computed swap-AB on wgmma: a consumer warpgroup's 64 rows of accumulators are
// columns of the output, and their columns are its rows. Of outputs of 16 bits, as in fragment.cuh: values are
// computed in the fragments' layout, in which a lane has two of the output's columns, so that scales and biases are
// four registers; stmatrix transposes pairs of them. The bits are the general epilogue's.
//
// A warp has 16 columns, 32 bytes of a row, or 16 bytes if gated. So the four warps of a warpgroup stage rows of 64
// columns together, 32 rows at a time, and store whole lines. There are two buffers, in turn: who has passed the
// barrier behind a chunk knows that the chunk before has been read.
#include "device/epilogue/fragment_transposed.cuh"
#include "device/ptx_sm90a.cuh"
#include "device/swizzled_rows.cuh"
#include "device/wgmma.cuh"

namespace forwardpass {

constexpr int kChunkRows = 32;

// Outputs have the type of the operand of 16 bits, Config::Element::X.
template <class Config>
struct SwappedEpilogue : TransposedEpilogue<Config> {
  using Base = TransposedEpilogue<Config>;
  using Accumulators = typename Config::Accumulators;
  using Base::out;
  static constexpr int kTilesN = Accumulators::kTilesN, kTiles = kChunkRows / 8, kChunks = kTilesN / kTiles;
  static constexpr int kBufferBytes = kChunkRows * ptx::kWgmmaRows * 2;
  struct alignas(128) Storage : Staging {};
  static_assert(2 * kBufferBytes <= 4 * sizeof(Storage) && kTilesN % kTiles == 0);

  const int warpgroup;
  uint8_t* const buffers;             // the warpgroup's: the staging buffers of its four warps
  int next = 0;                       // which of the two
  float scale[2] = {}, bias[2] = {};  // of this lane's columns of the output, in the tile that has begun

  template <class SharedStorage>
  __device__ SwappedEpilogue(SharedStorage& s, const GemmOutput& out)
      : Base(s, out),
        warpgroup(threadIdx.x / ptx::kWarpgroup),
        buffers(reinterpret_cast<uint8_t*>(&s.staging[warpgroup * 4])) {}

  // What a tile's outputs need beside its accumulators, loaded while those are computed.
  template <class Tile>
  __device__ void begin(const Tile& tile, int row, int) {
    if (!out.direct) return;
    const Epilogue& e = out.epilogue;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int64_t column = min(tile.row + row + accumulator_row(half * 2), out.columns - 1);
      scale[half] = e.b_scale ? e.b_scale[e.b_scale_per_column ? column : 0] : 1.0f;
      bias[half] = e.bias ? load_float(e.bias, e.bias_dtype, column) : 0.0f;
    }
  }
  // The warpgroups have all of the tile's columns each.
  template <class Tile>
  __device__ void operator()(const Accumulators& acc, const Tile& tile, int row, int) {
    // Of what k16Bits leaves so much is computed ahead of the main loop that 128 x 256 spills.
    if (!out.direct) return Base::template finish<false>(acc, tile, row, 0);
    const int64_t first = tile.row + warpgroup * ptx::kWgmmaRows;
    if (is_gated(out.epilogue.activation)) {
      store<true>(acc, tile.column, first / 2);
    } else {
      store<false>(acc, tile.column, first);
    }
  }

 private:
  // Of a lane's accumulators in a tile two are of one column, and two of the next: a row has no scale.
  struct TwoColumns {
    const float (&scale)[2], (&bias)[2];
    __device__ float row_scale(int) const { return 1.0f; }
    __device__ ColumnTerms column(int e) const { return {scale[e / 2], bias[e / 2]}; }
  };
  // From the n8 tile `first` on. Gated: the second column is the ups'.
  template <int kOutputs>
  __device__ void dequantize_chunk(float (&y)[kTiles * kOutputs], float (&up)[kTiles * 2], const Accumulators& acc,
                                   int first) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      float v[4];
      dequantize(v, acc[0][first + t], TwoColumns{scale, bias});
#pragma unroll
      for (int e = 0; e < 4; ++e) (e < kOutputs ? y[t * kOutputs + e] : up[t * 2 + e % 2]) = v[e];
    }
  }
  // Adds the residual to a chunk's outputs, of this lane from (row, column) on: two bytes at a time, as of each row it
  // has two columns that are eight apart.
  __device__ void add_residual_to(float (&y)[kTiles * 4], int64_t row, int64_t column) const {
    using T = cuda_t<Config::Element::X>;
    const Epilogue& e = out.epilogue;
    const T* p = static_cast<const T*>(e.residual) + row * e.residual_stride + column;
    T residual[kTiles * 4] = {};
#pragma unroll
    for (int i = 0; i < kTiles * 4; ++i) {
      const int below = i / 4 * 8 + i % 2, right = i % 4 / 2 * 8;
      if (row + below < out.rows && column + right < out.columns) residual[i] = p[below * e.residual_stride + right];
    }
    add_residual(y, residual);
  }
  // To (row, column) of the output on. Gated: of a lane's two columns the first is a gate and the second its up.
  template <bool kGated>
  __device__ void store(const Accumulators& acc, int64_t row, int64_t column) {
    constexpr int kColumns = ptx::kWgmmaRows / (kGated ? 2 : 1), kOutputs = kGated ? 2 : 4;  // of a lane in a tile
    using Rows = SwizzledRows<kColumns * 2>;
    constexpr int kAtOnce = ptx::kWarpgroup / Rows::kChunks;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4, thread = threadIdx.x % ptx::kWarpgroup;
    // The matrices of an stmatrix: two tiles' upper and lower rows or, if gated, four tiles' upper ones.
    const uint32_t to =
        ptx::shared_address(buffers) +
        (kGated ? Rows::offset(lane, warp) : Rows::offset(lane / 16 * 8 + lane % 8, warp * 2 + lane / 8 % 2));
    const uint8_t* from = buffers + Rows::offset(thread / Rows::kChunks, thread % Rows::kChunks);
    const int64_t columns = out.columns / (kGated ? 2 : 1), stride = out.epilogue.out_stride;
    const bool whole = out.access.out && column + kColumns <= columns;
    const int64_t first_row = row + thread_in_group() * 2, first_column = column + warp * 16 + group_id();
    row += thread / Rows::kChunks, column += thread % Rows::kChunks * kVec;
    auto* p = static_cast<uint16_t*>(out.epilogue.out) + row * stride + column;
    int rows = static_cast<int>(min(out.rows - row, int64_t{kTilesN * 8}));
    const int left = static_cast<int>(min(columns - column, int64_t{kVec}));
#pragma unroll 1
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int buffer = next * kBufferBytes;
      next ^= 1;
      float y[kTiles * kOutputs], up[kTiles * 2];
      at_index<kChunks>(chunk, [&](int i) { dequantize_chunk<kOutputs>(y, up, acc, i * kTiles); });
      activate(out.epilogue.activation, y);
      if constexpr (kGated) {
        multiply_by_up(y, up);
      } else {
        if (out.epilogue.residual) add_residual_to(y, first_row + chunk * kChunkRows, first_column);
      }
#pragma unroll
      for (int i = 0; i < kTiles * kOutputs; i += 8)
        ptx::stmatrix_x4_trans(
            to + buffer + i * 2 * kColumns * 2,
            {pair(y[i], y[i + 1]), pair(y[i + 2], y[i + 3]), pair(y[i + 4], y[i + 5]), pair(y[i + 6], y[i + 7])});
      ptx::barrier_sync(1 + warpgroup, ptx::kWarpgroup);
#pragma unroll
      for (int i = 0; i < kChunkRows; i += kAtOnce) {
        const uint4 v = *reinterpret_cast<const uint4*>(from + buffer + i * kColumns * 2);
        if (i >= rows) break;
        if (whole) {
          ptx::st_global(p + i * stride, v);
        } else {
          store_vec(reinterpret_cast<const Vec<uint16_t>&>(v), p + i * stride, left, out.access.out);
        }
      }
      p += kChunkRows * stride, rows -= kChunkRows;
    }
  }
  __device__ static uint32_t pair(float a, float b) { return pair_of_16_bits<Config::Element::X>(a, b); }
};

}  // namespace forwardpass
