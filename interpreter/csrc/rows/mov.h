#pragma once
#include "program.h"

namespace gpuless {

// Whether the instruction is d = a for whole registers of one size.
bool is_move(const Instruction&);

}  // namespace gpuless
