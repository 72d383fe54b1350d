#pragma once
#include "params/affine.h"

namespace forwardpass {

enum class Norm : int32_t { rms, layer };

// norm_quantize or, with a residual, add_norm_quantize: normalises x + residual, rounded to x's dtype, and stores it
// too.
struct NormQuantizeParams {
  static constexpr const char* kLauncher = "forwardpass_norm_quantize";
  Matrix x;
  Matrix residual;     // as x; null data: none
  void* residual_out;  // [rows, columns] of x's dtype, contiguous
  Affine weight, bias;
  float eps;
  Norm kind;
  QuantizedRows out;
};

void norm_quantize_cpu(const NormQuantizeParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_norm_quantize(const forwardpass::NormQuantizeParams* p, void* stream);
