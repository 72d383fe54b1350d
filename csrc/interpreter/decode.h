#pragma once
// Between decode.cpp and allocate.cpp.
#include "program.h"

namespace forwardpass::interpreter {

// Bytes of a register in a frame, padded to 64.
uint32_t frame_bytes(Type);
// Where a branch may go, besides on.
std::vector<uint32_t> branch_targets(const Instruction&);
// Rewrites every Offset of the code: nobody else may have kept one.
void share_registers(Code&);

}  // namespace forwardpass::interpreter
