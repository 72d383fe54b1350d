#pragma once
#include <cstdlib>
#include <string_view>

namespace forwardpass::cpu {

// Whether ATEN_CPU_CAPABILITY, which asks torch for less than the CPU has, leaves AVX-512 and what came after it. The
// kernels ask the CPU besides.
inline bool avx512_is_left() {
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  return !asked || std::string_view(asked).substr(0, 6) == "avx512";
}

}  // namespace forwardpass::cpu
