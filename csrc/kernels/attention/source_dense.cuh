#pragma once
// Keys and values by strides, block of keys after block, from the last to the first: a Source of prefill on mma.sync.
// Its copies of rows and their layout in shared memory are q's too.
#include "device/ptx_sm80.cuh"
#include "device/swizzled_rows.cuh"
#include "schedule/attention_tile.cuh"

namespace forwardpass {

// The shared-memory layout of rows of kColumns columns of 16 bits: panels of 64 or 32 columns; each has all rows.
template <int kColumns>
struct Panels {
  static constexpr int kPanel = kColumns % 64 == 0 ? 64 : 32, kCount = kColumns / kPanel;
  static constexpr int kRowBytes = kPanel * 2, kChunks = kPanel / 8;
  static_assert(kColumns % kPanel == 0);
  using Rows = SwizzledRows<kRowBytes>;

  // Byte offset of any column that is a multiple of 8, with kRows rows.
  template <int kRows>
  __device__ static int offset(int row, int column) {
    return column / kPanel * kRows * kRowBytes + Rows::offset(row, column % kPanel / 8);
  }
  // A lane's address for an ldmatrix of four 8 x 8 matrices: sixteen rows from `row` on of two chunks from `column` on,
  // both multiples of 16. kLowerSecond: the second matrix is the lower rows of the first chunk, else the second chunk
  // of the upper rows, whichever makes pairs of registers for the mma.
  template <int kRows, bool kLowerSecond>
  __device__ static uint32_t matrices(const uint16_t* shared, int row, int column) {
    const int lane = threadIdx.x % 32, i = lane / 8, lower = kLowerSecond ? i % 2 : i / 2,
              chunk = kLowerSecond ? i / 2 : i % 2;
    return ptx::shared_address(shared) + (column / kPanel * kRows + row) * kRowBytes +
           (Rows::offset(lower * 8 + lane % 8, chunk) ^ column % kPanel * 2);
  }
};

// Copies kRows rows of kColumns columns, and in each further call the kRows rows before.
template <int kRows, int kColumns, int kThreads>
struct RowCopy {
  using P = Panels<kColumns>;
  using Share = CopyShare<P::kRowBytes, kRows, kThreads>;
  const char* from;  // address of this thread's first row

  // Bytes from one of a thread's rows to its next. Computed on the host, as kernel parameters take no registers.
  static int64_t step(const AttentionTensor& t) { return t.row * Share::kStep * 2; }

  __device__ RowCopy(const AttentionTensor& t, int64_t offset)
      : from(static_cast<const char*>(t.data) + (offset + Share::row() * t.row + column()) * 2) {}
  __device__ static int column() { return Share::chunk() * 8; }
  // `rows` rows and `columns` columns exist (kWhole: all rows); the rest is zero-filled.
  template <bool kWhole>
  __device__ void copy(uint16_t* shared, int64_t step, int rows, int columns) {
    const uint32_t to = ptx::shared_address(shared) + Share::offset();
#pragma unroll
    for (int i = 0; i < Share::kCount; ++i) {
      const bool inside = kWhole || Share::row() + i * Share::kStep < rows;
#pragma unroll
      for (int panel = 0; panel < P::kCount; ++panel)
        ptx::cp_async_16(to + (panel * kRows + i * Share::kStep) * P::kRowBytes, from + panel * P::kRowBytes,
                         inside && panel * P::kPanel + column() < columns ? 16 : 0);
      from += step;
    }
    ptx::cp_async_commit();
  }
};

// What a kernel's source of keys has of the host: computed there, as kernel parameters take no registers.
struct DenseSteps {
  int64_t k, v;            // RowCopy's
  int64_t k_back, v_back;  // bytes from the end of a block of keys to the beginning of the block before
};

template <class Config>
class DenseSource {
 public:
  struct Shared {};

  // first: the block that comes first, which is the last.
  template <class Arguments>
  __device__ DenseSource(const Arguments& a, Shared&, const AttentionTile& tile, int first)
      : steps_(a.source),
        k_(a.p.k, tile.k(a.p) + first * Config::kN * a.p.k.row),
        v_(a.p.v, tile.v(a.p) + first * Config::kN * a.p.v.row) {}
  static DenseSteps steps(const AttentionParams& p) {
    return {CopyK::step(p.k), CopyV::step(p.v), Config::kN * 4 * p.k.row, Config::kN * 4 * p.v.row};
  }
  // Where the keys of a block are, in two steps: what the first one loads, the second one keeps. Here that is known.
  __device__ void begin(int) {}
  __device__ void look_up(int) {}
  __device__ void keep(int) {}
  // Copies a block's keys or values, of which so many exist (kWhole: all).
  template <bool kWhole>
  __device__ void copy_k(uint16_t* shared, int, int keys, int columns) {
    k_.template copy<kWhole>(shared, steps_.k, keys, columns);
  }
  template <bool kWhole>
  __device__ void copy_v(uint16_t* shared, int, int keys, int columns) {
    v_.template copy<kWhole>(shared, steps_.v, keys, columns);
  }
  // To the block before, after copy_v.
  __device__ void step_back() { v_.from -= steps_.v_back, k_.from -= steps_.k_back; }

 private:
  using CopyK = RowCopy<Config::kN, Config::kHeadDim, Config::kThreads>;
  using CopyV = RowCopy<Config::kN, Config::kValueDim, Config::kThreads>;
  const DenseSteps& steps_;
  CopyK k_;
  CopyV v_;
};

}  // namespace forwardpass
