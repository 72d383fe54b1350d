#pragma once
// What kind of work an instruction is, for counting: its class, and what of the tensor cores it uses.
#include <cstdint>
#include <string>
#include <string_view>

#include "program.h"

namespace gpuless {

// "integer", "shared load", "wgmma": the table in instruction_class.cpp has them all.
const char* class_of(std::string_view section, std::string_view opcode);

// Of one warp's instruction: wgmma's work is that of four warps, and each has a quarter of it. That of tcgen05.mma is
// counted as it is issued.
struct MatrixWork {
  std::string type;           // of A: "f16", "s8", "e4m3"; empty: no tensor core. Of 6 bits, or 4 beside others: "e4m3"
  uint64_t macs = 0;          // multiply-accumulates
  uint64_t shared_bytes = 0;  // operands that wgmma reads from shared memory, B once for the four warps
};
MatrixWork matrix_work(const Statement&);

}  // namespace gpuless
