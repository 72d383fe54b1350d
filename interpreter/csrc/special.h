#pragma once
// Special registers that keep their value while a CTA runs, PTX ISA section 10.
#include <cstdint>
#include <string_view>

#include "program.h"

namespace gpuless {

struct SpecialRegister {
  std::string_view name;
  uint64_t (*value)(const Warp&, int lane);
};
const SpecialRegister* special_register(std::string_view name);  // null: not one of them

}  // namespace gpuless
