// Device memory: the host's, poisoned, and known to the bounds check.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>

#include "core.h"
#include "device.h"

namespace {

struct Allocation {
  int64_t bytes;
  int kind;
};
std::mutex mutex;
std::map<uintptr_t, Allocation>& allocations() {
  static auto* all = new std::map<uintptr_t, Allocation>;  // never destroyed: programs free memory in their destructors
  return *all;
}
int64_t used = 0, peak = 0;

// cudaMalloc aligns to 256 bytes at least. The poison is NaN in every floating type and -1 in integers.
constexpr size_t kAlignment = 256;
constexpr int kPoison = 0xff;
// Behind each lies memory that is nobody's, so that what runs past an end does not get into the next: as much again.
constexpr int64_t kLeastGap = 4096, kLargestGap = 1 << 20;
constexpr const char* kNames[] = {"cudaMalloc", "cudaMallocHost", "cudaMallocManaged"};

}  // namespace

using namespace gpuless;

extern "C" {

int64_t gpuless_memory_free() {
  return guarded(int64_t{0}, [&]() -> int64_t {
    const std::lock_guard lock(mutex);
    return current_device() ? current_device()->memory - used : 0;
  });
}

int64_t gpuless_memory_peak(int reset) {
  const std::lock_guard lock(mutex);
  if (reset) peak = used;
  return peak;
}

void* gpuless_allocate(int64_t bytes, int kind) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* {
    if (bytes > gpuless_memory_free()) return nullptr;
    void* p = nullptr;
    if (posix_memalign(&p, kAlignment, bytes + std::clamp<int64_t>(bytes, kLeastGap, kLargestGap))) return nullptr;
    std::memset(p, kPoison, bytes);
    const std::lock_guard lock(mutex);
    allocations()[reinterpret_cast<uintptr_t>(p)] = {bytes, kind};
    used += bytes;
    peak = std::max(peak, used);
    storage().add(p, bytes, kNames[kind]);
    return p;
  });
}

int gpuless_release(void* begin) {
  return guarded(0, [&]() -> int {
    const std::lock_guard lock(mutex);
    const auto entry = allocations().find(reinterpret_cast<uintptr_t>(begin));
    if (entry == allocations().end()) return 0;
    used -= entry->second.bytes;
    storage().remove(begin);
    allocations().erase(entry);
    std::free(begin);
    return 1;
  });
}

int64_t gpuless_allocation(const void* pointer, void** begin, int* kind) {
  return guarded(int64_t{0}, [&]() -> int64_t {
    const std::lock_guard lock(mutex);
    const auto address = reinterpret_cast<uintptr_t>(pointer);
    auto entry = allocations().upper_bound(address);
    if (entry == allocations().begin()) return 0;
    --entry;
    if (address - entry->first >= static_cast<uint64_t>(entry->second.bytes)) return 0;
    *begin = reinterpret_cast<void*>(entry->first);
    *kind = entry->second.kind;
    return entry->second.bytes;
  });
}

}  // extern "C"
