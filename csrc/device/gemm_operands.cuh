#pragma once
// What the GEMMs on mma.sync and on wgmma share: the types of their operands.
#include "params/gemm.h"

namespace forwardpass {

// Element types of the operands: what an mma adds to, the bytes of an element of b, whether operands are
// exchanged (a is what the operation calls b), and whether sums have to be promoted. An fp8 mma keeps 13 bits of the
// largest product or sum (arXiv 2511.10909), so what it made of 128 of K goes to an fp32 sum. int8 is exact.
struct Int8 {
  using Acc = int32_t;
  static constexpr Dtype kAcc = Dtype::i32;
  static constexpr int kSizeB = 1;
  static constexpr bool kExchanged = false, kPromoted = false, kBlockScaled = false;
};
struct E4m3 {
  using Acc = float;
  static constexpr Dtype kAcc = Dtype::f32;
  static constexpr int kSizeB = 1;
  static constexpr bool kExchanged = false, kPromoted = true, kBlockScaled = false;
};
// with scales of blocks, by which each partial sum is multiplied as it is promoted: a branch of the same kernel
// would spill 1196 bytes
struct E4m3Blocks : E4m3 {
  static constexpr bool kBlockScaled = true;
};

}  // namespace forwardpass
