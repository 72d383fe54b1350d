#pragma once
#include <cstdlib>
#include <string_view>

namespace forwardpass::cpu {

// Whether ATEN_CPU_CAPABILITY, by which a user restricts torch to fewer instructions than the CPU has, allows AVX-512
// and later ones. The kernels check the CPU as well.
inline bool avx512_is_left() {
  const char* asked = std::getenv("ATEN_CPU_CAPABILITY");
  return !asked || std::string_view(asked).substr(0, 6) == "avx512";
}

}  // namespace forwardpass::cpu
