#pragma once
// The int8 GEMM on a CPU with AVX2, hand-written.
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass {

// Whether this CPU has AVX2 and the system allows its use.
bool has_avx2();

// As int8_amx.
void int8_avx2(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);

}  // namespace forwardpass
