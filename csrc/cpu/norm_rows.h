#pragma once
// The norm of norm_quantize without its quantisation, for kernels that go on with the row.
#include "params/norm_quantize.h"

namespace forwardpass {

// The normalised rows of p.x, which are fp32 as its weight and bias, to out [rows, columns] of a float dtype,
// contiguous.
void norm_rows(const NormQuantizeParams& p, void* out, Dtype out_dtype);

}  // namespace forwardpass
