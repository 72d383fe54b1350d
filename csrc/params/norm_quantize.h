#pragma once
#include "params/affine.h"

namespace forwardpass {

enum class Norm : int32_t { rms, layer };

// A vector over the columns for each sample, as in Affine.
struct SampleAffine {
  const void* data;  // [samples, columns]
  Dtype dtype;
  int64_t stride_bytes;
  HOST_DEVICE Affine of(int64_t sample) const {
    return {data ? static_cast<const char*>(data) + sample * stride_bytes : nullptr, dtype};
  }
};

// norm_quantize or, with a residual, add_norm_quantize: normalises x + residual, rounded to x's dtype, and stores it
// too.
struct NormQuantizeParams {
  static constexpr const char* kLauncher = "forwardpass_norm_quantize";
  Matrix x;
  Matrix residual;     // as x; null data: none
  void* residual_out;  // [rows, columns] of x's dtype, contiguous
  Affine weight, bias;
  SampleAffine ada_scale, ada_shift;  // of adaLN: the normalised value times 1 + ada_scale, plus ada_shift
  int64_t rows_per_sample;
  float eps;
  Norm kind;
  QuantizedRows out;
};

void norm_quantize_cpu(const NormQuantizeParams& p);

}  // namespace forwardpass

KERNEL_LIBRARY int forwardpass_norm_quantize(const forwardpass::NormQuantizeParams* p, void* stream);
