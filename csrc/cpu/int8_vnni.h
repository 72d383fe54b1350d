#pragma once
// The int8 GEMM on a CPU with AVX-512 VNNI, hand-written.
#include "params/dequant_activation.h"
#include "params/quantize.h"

namespace forwardpass {

// Whether this CPU has VNNI and the system allows its use.
bool has_vnni();

// As int8_amx.
void int8_vnni(const Matrix& a, const Matrix& b, const Epilogue& epilogue, const QuantizeParams* quantize);

}  // namespace forwardpass
