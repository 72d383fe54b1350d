#pragma once
#include <cstdlib>
#include <string_view>

namespace forwardpass::cpu {

// Whether ATEN_CPU_CAPABILITY, with which a user restricts torch's instruction set, allows AVX-512 and later
// extensions. Whether the CPU has them is for the caller to check.
inline bool avx512_is_allowed() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  return !capability || std::string_view(capability).substr(0, 6) == "avx512";
}

// The same of AVX2: not where it is "default".
inline bool avx2_is_allowed() {
  const char* capability = std::getenv("ATEN_CPU_CAPABILITY");
  return !capability || std::string_view(capability) != "default";
}

}  // namespace forwardpass::cpu
