#pragma once
// The int8 GEMM on a CPU by hand, for each instruction set that has a tier. All give the same bits.
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass {

// Whether this CPU has the instructions, and the system and the user allow them.
bool has_amx_int8();
bool has_vnni();
bool has_avx2();

// a int8 [M, K] or, with `quantize`, its x, times b int8 [N, K], through the epilogue. With `quantize`, a.data is not
// read and quantize->out.q is not written.
void int8_amx(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);
void int8_vnni(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);
void int8_avx2(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);

}  // namespace forwardpass
