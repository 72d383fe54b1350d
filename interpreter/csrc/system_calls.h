#pragma once
// Functions that kernels call and no PTX file holds: device printf and assert, the device heap.
#include <cstdint>
#include <string_view>

#include "machine.h"

namespace gpuless {

// Of one lane, its arguments widened to 64 bits; pointers are generic.
using SystemCall = uint64_t (*)(Warp&, int lane, const uint64_t* arguments);
SystemCall system_call(std::string_view name, size_t* arguments);  // and how many it takes; null: unknown

}  // namespace gpuless
