#pragma once
// What the GEMMs on mma.sync and on wgmma share: the types of their operands.
#include "params/gemm.h"

namespace forwardpass {

// Element types of the operands: the accumulator of an mma, the bytes of an element of b, whether the kernel's a is
// what the operation calls b (swap-AB), and whether accumulators are promoted. An fp8 mma keeps 13 bits of the largest
// product or sum (arXiv 2511.10909), so its accumulators over 128 of K are added to fp32 ones. int8 is exact.
struct Int8 {
  using Acc = int32_t;
  static constexpr Dtype kAcc = Dtype::i32;
  static constexpr int kSizeB = 1;
  static constexpr bool kSwapAB = false, kPromoted = false, kBlockScaled = false;
};
struct E4m3 {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = 1;
  static constexpr bool kSwapAB = false, kPromoted = true, kBlockScaled = false;
};
// With block scales: each partial accumulator is multiplied by them as it is promoted. A branch in the kernel without
// them would spill 1196 bytes.
struct E4m3Blocks : E4m3 {
  static constexpr bool kBlockScaled = true;
};

}  // namespace forwardpass
