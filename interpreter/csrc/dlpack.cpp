// Device memory as DLPack's DLManagedTensor: a row of bytes that a framework takes for memory of a CUDA device, and the
// same bytes once more as memory of the CPU. The memory lives as long as anybody holds either.
#include <map>
#include <mutex>

#include "core.h"

namespace {

// DLPack's structures, versions before 1.0 (dmlc/dlpack, include/dlpack/dlpack.h): the ABI that every framework reads.
struct DLTensor {
  void* data;
  int32_t device_type, device_id;
  int32_t dimensions;
  uint8_t type_code, type_bits;
  uint16_t type_lanes;
  int64_t *shape, *strides;
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor tensor;
  void* context;
  void (*deleter)(DLManagedTensor*);
};
constexpr int32_t kCpu = 1, kCuda = 2;
constexpr uint8_t kUnsigned = 1;

struct Bytes {
  DLManagedTensor managed;
  int64_t size;
};

std::mutex mutex;
std::map<void*, int>& holders() {
  static auto* all = new std::map<void*, int>;  // never destroyed: frameworks free tensors after main
  return *all;
}

void release(DLManagedTensor* m) {
  const auto* bytes = static_cast<Bytes*>(m->context);
  if (void* data = m->tensor.data) {
    const std::lock_guard lock(mutex);
    const auto entry = holders().find(data);
    if (entry != holders().end() && --entry->second == 0) {
      holders().erase(entry);
      gpuless_release(data);
    }
  }
  delete bytes;
}

DLManagedTensor* make(void* data, int64_t size, int32_t device_type) {
  auto* bytes = new Bytes{{{data, device_type, 0, 1, kUnsigned, 8, 1, nullptr, nullptr, 0}, nullptr, release}, size};
  bytes->managed.context = bytes;
  bytes->managed.tensor.shape = &bytes->size;
  return &bytes->managed;
}

}  // namespace

using namespace gpuless;

extern "C" {

void* gpuless_dlpack_allocate(int64_t bytes) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* {
    void* data = bytes ? gpuless_allocate(bytes, gpuless_memory_device) : nullptr;
    if (bytes && !data) return nullptr;
    const std::lock_guard lock(mutex);
    if (data) holders()[data] = 1;
    return make(data, bytes, kCuda);
  });
}

void* gpuless_dlpack_host_view(void* data, int64_t bytes) {
  return guarded(static_cast<void*>(nullptr), [&]() -> void* {
    const std::lock_guard lock(mutex);
    const auto entry = holders().find(data);
    if (data && entry == holders().end()) return nullptr;
    if (data) ++entry->second;
    return make(data, bytes, kCpu);
  });
}

}  // extern "C"
