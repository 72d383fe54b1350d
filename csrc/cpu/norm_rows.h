#pragma once
// The norm of norm_quantize without its quantisation, for kernels that go on with the row.
#include "params/norm_quantize.h"

namespace forwardpass {

// The normalised rows of p.x, which are fp32, to out [rows, columns] of a float dtype, contiguous. Weight and bias are
// fp32 or of affine_dtype.
void norm_rows(const NormQuantizeParams& p, Dtype affine_dtype, void* out, Dtype out_dtype);

}  // namespace forwardpass
