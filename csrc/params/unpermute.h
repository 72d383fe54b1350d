#pragma once
#include "params/common.h"
#include "params/device.h"

namespace forwardpass {

// unpermute: out[t] = the sum of weights[t, i] * y[position[t, i]] for i in order, each product and each sum rounded
// once to fp32, then once to y's dtype. Positions that are no row of y are left out.
struct UnpermuteParams {
  static constexpr const char* kLauncher = "forwardpass_unpermute";
  Matrix y;                 // f32, f16 or bf16
  const int32_t* position;  // [tokens, choices]
  const void* weights;      // [tokens, choices]
  Dtype weights_dtype;      // f32 or y's
  int64_t tokens;
  int32_t choices;
  void* out;      // [tokens, columns] of y's dtype, contiguous
  Device device;  // that runs it; unused on a CPU
};

void unpermute_cpu(const UnpermuteParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_unpermute(const forwardpass::UnpermuteParams* p, void* stream);
