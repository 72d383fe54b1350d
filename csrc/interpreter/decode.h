#pragma once
// What decode.cpp has of others, and they of it.
#include "program.h"

namespace forwardpass::interpreter {

// Throws a Finding of kind unsupported, at a line of the PTX; 0: none, and no kernel: "".
[[noreturn]] void refuse(const Module&, int line, const std::string& kernel, const std::string& why);
// Bytes of a register in a frame, padded to 64.
uint32_t frame_bytes(Type);
// Where a branch may go, besides on.
std::vector<uint32_t> branch_targets(const Instruction&);
// Marks each wgmma.mma_async that a wgmma.fence is missing before. Before share_registers.
void find_missing_wgmma_fences(Code&);
// Rewrites every Offset of the code: nobody else may have kept one.
void share_registers(Code&);

}  // namespace forwardpass::interpreter
