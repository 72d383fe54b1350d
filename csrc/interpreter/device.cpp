#include "device.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "interpreter.h"

namespace forwardpass::interpreter {
namespace {

// CUDA C++ Programming Guide, "Compute Capabilities": technical specifications per compute capability.
const Device devices[] = {
    {"sm_80", "NVIDIA A100-SXM4-80GB (interpreted)", 8, 0, 108, 49152, 166912, 167936, 65536, 2048, 32, false},
    {"sm_89", "NVIDIA L40S (interpreted)", 8, 9, 142, 49152, 101376, 102400, 65536, 1536, 24, false},
    {"sm_90a", "NVIDIA H100 80GB HBM3 (interpreted)", 9, 0, 132, 49152, 232448, 233472, 65536, 2048, 32, true},
};
std::atomic<const Device*> current{nullptr};

}  // namespace

const Device* current_device() { return current; }

const Device* find_device(const char* arch) {
  for (const Device& d : devices)
    if (!std::strcmp(d.arch, arch)) return &d;
  return nullptr;
}

bool set_device(const char* arch) {
  const Device* d = arch ? find_device(arch) : nullptr;
  if (arch && !d) return false;
  current = d;
  return true;
}

int resident_blocks(const Device& d, const Code&, int threads, int64_t shared_bytes) {
  const int warps = (threads + 31) / 32;
  const int by_threads = d.threads_per_multiprocessor / (warps * 32);
  const int by_shared = static_cast<int>(d.shared_per_multiprocessor / (shared_bytes + 1024));
  return std::max(0, std::min({by_threads, by_shared, d.blocks_per_multiprocessor}));
}

}  // namespace forwardpass::interpreter

extern "C" int fpi_set_device(const char* arch) {
  return forwardpass::interpreter::set_device(arch) ? 0 : 1;
}
extern "C" const char* fpi_device() {
  const auto* d = forwardpass::interpreter::current_device();
  return d ? d->arch : "";
}
