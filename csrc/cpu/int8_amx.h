#pragma once
// int8 products on a CPU with AMX, by hand.
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass {

// Whether this CPU has AMX for int8, and the system lets it be used.
bool has_amx_int8();

// a int8 [M, K], or where `quantize` is given its x, times b int8 [N, K], through the epilogue. Where it is given,
// a.data is not read, and quantize->out.q is not written.
void int8_amx(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);

}  // namespace forwardpass
