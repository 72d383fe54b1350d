// Device memory: the host's, poisoned, and known to the bounds check.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <new>

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

// From this size on, an allocation is sparse: it maps one file of poison over and over, and a page takes memory once it
// is written. Below it, malloc hands freed memory out again: to fill 1 MiB of that takes 0.02 ms, and 0.6 ms by the
// page faults of a sparse one. Above it, malloc maps fresh pages itself (glibc's largest M_MMAP_THRESHOLD), which cost
// the same.
constexpr int64_t kSparse = int64_t{32} << 20;
// Of the file. A process may have 65530 mappings (vm.max_map_count), and 180 GB take 11,520 of these.
constexpr int64_t kPoisonBytes = int64_t{16} << 20;
constexpr int kReadWrite = PROT_READ | PROT_WRITE;

int64_t whole_pages(int64_t bytes) {
  static const int64_t page = sysconf(_SC_PAGESIZE);
  return (bytes + page - 1) / page * page;
}

int poison_file() {
  static const int file = [] {
    const int f = memfd_create("gpuless poison", MFD_CLOEXEC);
    if (f < 0 || ftruncate(f, kPoisonBytes)) throw std::bad_alloc();
    void* const p = mmap(nullptr, kPoisonBytes, kReadWrite, MAP_SHARED, f, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    std::memset(p, kPoison, kPoisonBytes);
    munmap(p, kPoisonBytes);
    return f;
  }();
  return file;
}

// Maps whole pages in place of those that are there.
bool map_poison(char* begin, int64_t bytes) {
  for (int64_t done = 0; done < bytes; done += kPoisonBytes) {
    constexpr int kFlags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE;
    const int64_t part = std::min(kPoisonBytes, bytes - done);
    if (mmap(begin + done, part, kReadWrite, kFlags, poison_file(), 0) == MAP_FAILED) return false;
  }
  return true;
}
bool map_zeros(char* begin, int64_t bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_FIXED | MAP_NORESERVE | MAP_ANONYMOUS;
  return mmap(begin, bytes, kReadWrite, kFlags, -1, 0) != MAP_FAILED;
}

int64_t sparse_bytes(int64_t bytes) { return whole_pages(bytes) + kLargestGap; }  // of the address space

void* allocate_sparse(int64_t bytes) {
  constexpr int kFlags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  void* const p = mmap(nullptr, sparse_bytes(bytes), PROT_NONE, kFlags, -1, 0);
  if (p == MAP_FAILED) return nullptr;
  if (map_poison(static_cast<char*>(p), whole_pages(bytes))) return p;
  munmap(p, sparse_bytes(bytes));
  return nullptr;
}

void* allocate_dense(int64_t bytes) {
  void* p = nullptr;
  if (posix_memalign(&p, kAlignment, bytes + std::clamp<int64_t>(bytes, kLeastGap, kLargestGap))) return nullptr;
  return std::memset(p, kPoison, bytes);
}

// Whether [begin, begin + bytes) lies within one sparse allocation.
bool in_sparse(const char* begin, int64_t bytes) {
  const std::lock_guard lock(mutex);
  const auto address = reinterpret_cast<uintptr_t>(begin);
  auto entry = allocations().upper_bound(address);
  if (entry == allocations().begin()) return false;
  --entry;
  const int64_t offset = static_cast<int64_t>(address - entry->first), size = entry->second.bytes;
  return size >= kSparse && offset < size && bytes <= size - offset;
}

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
    void* const p = bytes < kSparse ? allocate_dense(bytes) : allocate_sparse(bytes);
    if (!p) return nullptr;
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
    const int64_t bytes = entry->second.bytes;
    used -= bytes;
    storage().remove(begin);
    allocations().erase(entry);
    bytes < kSparse ? std::free(begin) : static_cast<void>(munmap(begin, sparse_bytes(bytes)));
    return 1;
  });
}

int gpuless_fill(void* to, int value, int64_t bytes) {
  return guarded([&] {
    auto* const begin = static_cast<char*>(to);
    const int64_t page = whole_pages(1), to_page = -reinterpret_cast<intptr_t>(to) & (page - 1);
    const int64_t inner = (bytes - to_page) / page * page, behind = to_page + inner;
    const bool poison = (value & 0xff) == kPoison, zeros = (value & 0xff) == 0;
    if (!(poison || zeros) || inner < kSparse || !in_sparse(begin, bytes)) {
      std::memset(begin, value, bytes);
      return;
    }
    if (!(poison ? map_poison(begin + to_page, inner) : map_zeros(begin + to_page, inner))) throw std::bad_alloc();
    std::memset(begin, value, to_page);
    std::memset(begin + behind, value, bytes - behind);
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
