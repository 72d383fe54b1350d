#include "cpu/tier.h"

#include <algorithm>
#include <array>
#include <cstdlib>

#if defined(__x86_64__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "torch/check.h"

// The tests preload a library that defines it, and that runs the instructions of a feature by trapping them: so tiers
// are tested on a CPU that lacks them.
extern "C" __attribute__((weak)) bool forwardpass_emulates(const char* feature);

namespace forwardpass::cpu {
namespace {

constexpr std::array<std::string_view, 6> kNames{"baseline", "avx2", "avx_vnni", "avx512", "avx512_vnni", "amx"};

std::string_view environment(const char* name) {
  const char* value = std::getenv(name);
  return value ? value : "";
}

// torch's variable restricts a user's whole process. It knows no AVX-VNNI, which has the vectors of AVX2.
Tier allowed_by_torch() {
  const std::string_view capability = environment("ATEN_CPU_CAPABILITY");
  if (capability == "default") return Tier::baseline;
  return capability == "avx2" ? Tier::avx_vnni : Tier::amx;
}

#if defined(__x86_64__)
// Asks the kernel for the tile registers, which a process must do once before it uses them.
bool request_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

bool is_emulated(const char* feature) { return forwardpass_emulates && forwardpass_emulates(feature); }

bool is_available(Tier t) {
  switch (t) {
    case Tier::baseline:
      return true;
    case Tier::avx2:
      return __builtin_cpu_supports("x86-64-v3");
    case Tier::avx_vnni:  // AVX-512 has its instruction too
      return is_available(Tier::avx2) && (has_avx_vnni() || is_available(Tier::avx512_vnni));
    case Tier::avx512:
      return __builtin_cpu_supports("x86-64-v4");
    case Tier::avx512_vnni:
      return is_available(Tier::avx512) && __builtin_cpu_supports("avx512vnni");
    case Tier::amx:
      return is_available(Tier::avx512_vnni) &&
             (is_emulated("amx-int8") || (__builtin_cpu_supports("amx-int8") && request_tiles()));
  }
  return false;
}
#else
bool is_available(Tier t) { return t == Tier::baseline; }
#endif

Tier choose() {
  const std::vector<Tier> all = tiers();
  const std::string_view request = environment("FORWARDPASS_CPU");
  if (request.empty()) return all.back();
  const auto t = std::find_if(all.begin(), all.end(), [&](Tier t) { return name_of(t) == request; });
  STD_TORCH_CHECK(t != all.end(), "FORWARDPASS_CPU names no tier of this CPU");
  return *t;
}

}  // namespace

#if defined(__x86_64__)
bool has_avx_vnni() { return is_emulated("avxvnni") || __builtin_cpu_supports("avxvnni"); }
bool has_avx512_bf16() { return tier() >= Tier::avx512_vnni && __builtin_cpu_supports("avx512bf16"); }
#else
bool has_avx512_bf16() { return false; }
#endif

std::string_view name_of(Tier t) { return kNames[int(t)]; }

std::vector<Tier> tiers() {
  std::vector<Tier> all;
  for (Tier t = Tier::baseline; t <= allowed_by_torch(); t = Tier(int(t) + 1))
    if (is_available(t)) all.push_back(t);
  return all;
}

Tier tier() {
  static const Tier tier = choose();
  return tier;
}

}  // namespace forwardpass::cpu
