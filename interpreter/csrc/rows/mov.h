#pragma once
#include "interpreter/program.h"

namespace forwardpass::interpreter {

// Whether the instruction is d = a for whole registers of one size.
bool is_move(const Instruction&);

}  // namespace forwardpass::interpreter
