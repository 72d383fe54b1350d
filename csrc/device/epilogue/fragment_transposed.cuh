#pragma once
// The general epilogue of accumulators whose rows are the output's columns: the product was computed as its transpose,
// of the whole tile (swap-AB) or of what a warp multiplies. Config::kTileSwapped: a tile's rows are the output's
// columns too.
#include "device/epilogue/staged.cuh"

namespace forwardpass {

template <class Config>
struct TransposedEpilogue : WarpEpilogue<Staging> {
  using WarpEpilogue::WarpEpilogue;
  using Accumulators = typename Config::Accumulators;
  static constexpr bool kQuantizes = false, kSwapped = Config::kTileSwapped;

  template <class Tile>
  __device__ void begin(const Tile&, int, int) const {}

  template <class Tile>
  __device__ void operator()(const Accumulators& acc, const Tile& tile, int row, int column) const {
    finish<Config::Element::k16Bits>(acc, tile, row, column);
  }
  // k16Bits: as store_output has it.
  template <bool k16Bits, class Tile>
  __device__ void finish(const Accumulators& acc, const Tile& tile, int row, int column) const {
    constexpr int kTilesN = Accumulators::kTilesM, kTilesM = Accumulators::kTilesN;  // of the output
    static_assert(kTilesN == 1 || Accumulators::kStep == 16);
    constexpr int kColumns = kTilesN * 16, kFit = kStagingColumns / kColumns,
                  kBeside = kFit < kTilesM / 2 ? kFit : kTilesM / 2;
    static_assert(kTilesM % (2 * kBeside) == 0);
    const int64_t tile_row = tile.row + row, tile_column = tile.column + column;
    const int64_t out_row = kSwapped ? tile_column : tile_row, out_column = kSwapped ? tile_row : tile_column;
#pragma unroll 1
    for (int chunk = 0; chunk < kTilesM / 2; chunk += kBeside) {
      at_index<kTilesM / 2 / kBeside>(chunk / kBeside, [&](int i) { stage<kBeside>(acc, i * 2 * kBeside); });
      __syncwarp();
      finish_staged<kColumns, typename Accumulators::Element, k16Bits, kBeside>(
          *staging, out, out_row + chunk * kStagingRows, out_column, tile.split);
      __syncwarp();
    }
  }

 private:
  // Stages kBeside blocks of sixteen rows of the output, from the n8 tile `first` on.
  template <int kBeside>
  __device__ void stage(const Accumulators& acc, int first) const {
    constexpr int kTilesN = Accumulators::kTilesM;
#pragma unroll
    for (int i = 0; i < kTilesN; ++i)
#pragma unroll
      for (int j = 0; j < 2 * kBeside; ++j)
        stage_transposed(*staging, j % 2 * 8, j / 2 * kTilesN * 16 + i * 16, acc[i][first + j]);
  }
};

// The same where stages are loaded ahead, behind which the epilogue's own loads from DRAM would wait. So a byte of each
// sector that it needs is read as the tile begins, and is in a cache then: modelled on an H100, 16 rows of each of 8
// experts by 7168 x 2048 with scales of rows take 45.7 us, else 49.9.
template <class Config>
struct CachedEpilogue : TransposedEpilogue<Config> {
  using Base = TransposedEpilogue<Config>;
  using Base::Base;
  uint32_t read = 0;

  // By 16 lanes the scales of 64 rows, by 8 those of the warp's 16 columns, by 8 their biases.
  template <class Tile>
  __device__ void begin(const Tile& tile, int row, int column) {
    const Epilogue& e = this->out.epilogue;
    const int lane = threadIdx.x % 32;
    const int64_t first_row = tile.row + row, first_column = tile.column + column,
                  out_row = (Base::kSwapped ? first_column : first_row) + lane % 16 * 4,
                  out_column = (Base::kSwapped ? first_row : first_column) + lane % 8 * 2;
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
  template <class Tile>
  __device__ void operator()(const typename Config::Accumulators& acc, const Tile& tile, int row, int column) const {
    ptx::unknown(static_cast<int32_t>(read));  // its register is free from here on: nothing waits for the byte before
    Base::operator()(acc, tile, row, column);
  }
};

}  // namespace forwardpass
