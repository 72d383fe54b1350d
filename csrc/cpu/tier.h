#pragma once
// Which of the CPU's instruction sets the kernels use.
#include <string_view>
#include <vector>

namespace forwardpass::cpu {

// In rising order; each has what those before it have, but for avx512, which needs no AVX-VNNI.
enum class Tier { baseline, avx2, avx_vnni, avx512, avx512_vnni, amx };

// Those that the CPU, the system and ATEN_CPU_CAPABILITY allow.
std::vector<Tier> tiers();
// The best of them, or the one that FORWARDPASS_CPU names; throws where it is none of them.
Tier tier();

std::string_view name_of(Tier t);

// Whether the CPU has the instruction as AVX-VNNI encodes it, and not only as AVX-512 does.
bool has_avx_vnni();
// Whether the CPU adds products of bfloat16, and the tier is not held below AVX-512 VNNI.
bool has_avx512_bf16();

}  // namespace forwardpass::cpu
