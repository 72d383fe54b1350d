#pragma once
// One mma.sync: 16 or 8 rows of A, 8 columns of B.
#include "matrix.h"
#include "program.h"

namespace gpuless {

struct Mma {
  Product exact, truncating;
  int a_registers, b_registers, d_registers;
  uint64_t macs;
};
// Instruction::data is the Mma; the operands are the registers of D, A, B and C.
Step mma(Warp&, const Instruction&, Mask);

}  // namespace gpuless
