#pragma once
// The int8 GEMM on a CPU with AMX, hand-written.
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass {

// Whether this CPU has AMX for int8 and the system allows its use.
bool has_amx_int8();

// a int8 [M, K] or, with `quantize`, its x, times b int8 [N, K], through the epilogue. With `quantize`, a.data is not
// read and quantize->out.q is not written.
void int8_amx(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);

}  // namespace forwardpass
