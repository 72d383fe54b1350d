#pragma once
// What a PTX text may ask for. A few characters can declare anything: what is beyond these is refused, with its line,
// before it takes memory or time. Each is a limit of ptxas or of the hardware, or far beyond what compilers write.
#include <cstdint>

namespace gpuless::ptx {

constexpr int kMostNested = 256;                         // blocks, brackets and signs, each a call of the parser's
constexpr int64_t kMostRegisters = 1 << 18;              // of a function
constexpr int64_t kMostLive = int64_t{1} << 31;          // of a function, its registers times its basic blocks
constexpr int64_t kMostAlignment = 1 << 16;              // bytes, as are the following
constexpr int64_t kMostShared = 1 << 24;                 // static: beyond it an address would name another CTA
constexpr int64_t kMostLocal = 512 << 10;                // of a thread, its calls included
constexpr int64_t kMostKernelParameters = 32764;         // ISA 5.1.6.1
constexpr int64_t kMostParameters = 1 << 20;             // of a function, those of its calls included
constexpr int64_t kMostGlobal = 1 << 30;                 // .global and .const of a module
constexpr int64_t kMostFrames = 64 << 20;                // registers and parameters of a warp's calls
constexpr unsigned kMostThreads = 1024, kMostCtas = 16;  // of a CTA, of a cluster

}  // namespace gpuless::ptx
