#pragma once
// What GEMM kernels are given: the types of their operands, and the arguments of those that read them by address.
#include "schedule/gemm_tile.cuh"

namespace forwardpass {

// Element types of the operands: the accumulator of an mma, the bytes of an element of b, whether the kernel's a is
// what the operation calls b (swap-AB), whether all outputs are of 16 bits, and whether accumulators are promoted. An
// fp8 mma keeps 13 bits of the largest product or sum (arXiv 2511.10909), so its accumulators over 128 of K are added
// to fp32 ones. int8 is exact.
struct Int8 {
  using Acc = int32_t;
  static constexpr Dtype kAcc = Dtype::i32;
  static constexpr int kSizeB = 1;
  static constexpr bool kSwapAB = false, k16Bits = false, kPromoted = false, kBlockScaled = false,
                        kOptionalBlocks = false;
};
struct E4m3 {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = 1;
  static constexpr bool kSwapAB = false, k16Bits = false, kPromoted = true, kBlockScaled = false,
                        kOptionalBlocks = false;
};
// With block scales: each partial accumulator is multiplied by them as it is promoted. A branch in the kernel on
// mma.sync without them would spill 1196 bytes.
struct E4m3Blocks : E4m3 {
  static constexpr bool kBlockScaled = true;
};
// A kernel for both: block scales are 1 where scales are of rows.
struct E4m3OptionalBlocks : E4m3Blocks {
  static constexpr bool kOptionalBlocks = true;
};

// A launch of a kernel on mma.sync, or of a GEMV.
struct GemmArguments {
  Matrix a, b;
  BlockScales blocks;
  TileMap map;
  GemmOutput out;
  bool b_first;  // b may be read before earlier kernels have ended
  Groups groups;

  GemmArguments(const GemmParams& p, int64_t tiles_m, int tile_n)
      : a(p.a),
        b(p.b),
        blocks(p.blocks),
        map(tiles_m, ceil_div(p.columns(), tile_n), p.choice.splits, p.a.columns, p.choice.split_k),
        out(p),
        b_first(p.b_first),
        groups(p.groups) {}
  __device__ bool gated() const { return is_gated(out.epilogue.activation); }
};

}  // namespace forwardpass
