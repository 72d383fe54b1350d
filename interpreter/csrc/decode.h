#pragma once
// What decode.cpp and the files that it calls share.
#include "program.h"

namespace gpuless {

// Throws a Finding of kind unsupported, at a line of the PTX (0: at none) and in a kernel ("": in none).
[[noreturn]] void refuse(const Module&, int line, const std::string& kernel, const std::string& why);
// Bytes of a register in a frame, padded to 64.
uint32_t frame_bytes(Type);
// A static .shared variable by the name that a function has for it, by Module::shared; -1: there is none.
int shared_variable(const Module&, const Code&, const std::string& name);
// Where a branch may go, other than to the next instruction.
std::vector<uint32_t> branch_targets(const Instruction&);
// Marks each wgmma.mma_async before which a wgmma.fence is missing. Must be called before share_registers.
void find_missing_wgmma_fences(Code&);
// The key in Code::live of all registers.
constexpr uint32_t kAnywhere = ~uint32_t{0};
// Rewrites every Offset in the code, so that one that was stored elsewhere is no longer valid. Fills in Code::live.
void share_registers(Code&);

}  // namespace gpuless
