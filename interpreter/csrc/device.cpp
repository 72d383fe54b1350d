#include "device.h"

#include <algorithm>
#include <atomic>
#include <charconv>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

namespace gpuless {
namespace {

constexpr int64_t kKiB = 1 << 10, kMiB = 1 << 20, kGiB = 1 << 30;

// Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability" (8.0, 8.9, 9.0, 10.0, 12.0).
// Multiprocessors, caches, memory: NVIDIA A100 Tensor Core GPU Architecture (A100 80GB SXM: 2039 GB/s), NVIDIA L40S
// datasheet (864 GB/s), NVIDIA H100 Tensor Core GPU Architecture (SXM5: 3352 GB/s), NVIDIA RTX PRO 6000 Blackwell
// Workstation Edition datasheet (1792 GB/s). The bandwidths are 2 x memory_clock x memory_bus_bits / 8. Clocks are the
// boost clocks. How much of its L2 the last one lets persist is assumed, as on the L40S. The B200's multiprocessors,
// clocks and bus are what cudaGetDeviceProperties says of one, as others quote it (7.7 TB/s, 180 GB: NVIDIA HGX B200
// datasheet); its L2 is 126 MB there, and how much of it persists is assumed.
constexpr Device devices[] = {
    {"sm_80",    "NVIDIA A100-SXM4-80GB (interpreted)",
     8,          0,
     108,        48 * kKiB,
     163 * kKiB, 164 * kKiB,
     1 * kKiB,   65536,
     65536,      kThreadsPerBlock,
     2048,       32,
     0,          80 * kGiB,
     40 * kMiB,  30 * kMiB,
     1410000,    1593000,
     5120},
    {"sm_89",   "NVIDIA L40S (interpreted)",
     8,         9,
     142,       48 * kKiB,
     99 * kKiB, 100 * kKiB,
     1 * kKiB,  65536,
     65536,     kThreadsPerBlock,
     1536,      24,
     0,         48 * kGiB,
     96 * kMiB, 66 * kMiB,
     2520000,   9001000,
     384},
    {"sm_90a",   "NVIDIA H100 80GB HBM3 (interpreted)",
     9,          0,
     132,        48 * kKiB,
     227 * kKiB, 228 * kKiB,
     1 * kKiB,   65536,
     65536,      kThreadsPerBlock,
     2048,       32,
     1,          80 * kGiB,
     50 * kMiB,  32 * kMiB,
     1980000,    2619000,
     5120},
    {"sm_100a",  "NVIDIA B200 (interpreted)",
     10,         0,
     148,        48 * kKiB,
     227 * kKiB, 228 * kKiB,
     1 * kKiB,   65536,
     65536,      kThreadsPerBlock,
     2048,       32,
     1,          180 * kGiB,
     126 * kMiB, 79 * kMiB,
     1965000,    3996000,
     7680},
    {"sm_120",   "NVIDIA RTX PRO 6000 Blackwell (interpreted)",
     12,         0,
     188,        48 * kKiB,
     99 * kKiB,  100 * kKiB,
     1 * kKiB,   65536,
     65536,      kThreadsPerBlock,
     1536,       24,
     1,          96 * kGiB,
     128 * kMiB, 88 * kMiB,
     2617000,    14000000,
     512},
};
std::atomic<const Device*> current{nullptr};
thread_local int64_t dropped = -1;  // launches; -1: they run

template <class T>
T round_up(T n, T multiple) {
  return (n + multiple - 1) / multiple * multiple;
}

// "Register allocation unit size" and "granularity" per warp, the warps of a block spread over four schedulers, and the
// unit of shared memory, of compute capabilities 8 and 9: CUDA's cuda_occupancy.h.
constexpr int kRegisterUnit = 256, kSchedulers = 4;
constexpr int64_t kSharedUnit = 128;

// Slices that have been asked for, which others keep pointers to.
const Device* find_slice(const Device& whole, int multiprocessors) {
  if (multiprocessors < 1 || multiprocessors > whole.multiprocessors) return nullptr;
  if (multiprocessors == whole.multiprocessors) return &whole;
  static std::mutex mutex;
  static auto* const slices = new std::map<std::pair<const Device*, int>, Device>;
  const std::lock_guard lock(mutex);
  Device& slice = slices->emplace(std::pair(&whole, multiprocessors), whole).first->second;
  slice.multiprocessors = multiprocessors;
  return &slice;
}

unsigned product(const unsigned (&n)[3]) { return n[0] * std::max(n[1], 1u) * std::max(n[2], 1u); }

}  // namespace

const Device* current_device() { return current; }

const Device* find_device(const char* arch) {
  const char* const slice = std::strchr(arch, '/');
  const size_t length = slice ? static_cast<size_t>(slice - arch) : std::strlen(arch);
  for (const Device& d : devices) {
    if (std::strlen(d.arch) != length || std::strncmp(d.arch, arch, length) != 0) continue;
    if (!slice) return &d;
    int multiprocessors = 0;  // not atoi: it binds the library to glibc 2.38
    std::from_chars(slice + 1, slice + std::strlen(slice), multiprocessors);
    return find_slice(d, multiprocessors);
  }
  return nullptr;
}

bool set_device(const char* arch) {
  const Device* d = arch ? find_device(arch) : nullptr;
  if (arch && !d) return false;
  current = d;
  dropped = -1;
  return true;
}

bool drops_launch() { return dropped >= 0 && ++dropped; }

unsigned max_threads(const ptx::Function& f) {
  if (f.required_threads[0]) return product(f.required_threads);
  return f.max_threads[0] ? product(f.max_threads) : kThreadsPerBlock;
}

int assumed_registers(const Device& d, const ptx::Function& f) {
  const int warps = (static_cast<int>(max_threads(f)) + 31) / 32;
  const int blocks = std::clamp<int>(std::min<unsigned>(f.min_ctas, INT32_MAX), 1, d.blocks_per_multiprocessor);
  const int of_warp =
      d.registers_per_multiprocessor / (round_up(warps, kSchedulers) * blocks) / kRegisterUnit * kRegisterUnit;
  const int limit = std::min(255, of_warp / 32);
  if (f.max_registers) return std::min(static_cast<int>(f.max_registers), limit);
  return f.min_ctas ? limit : std::min(64, limit);
}

int resident_blocks(const Device& d, int registers, int threads, int64_t shared_bytes) {
  if (threads < 1 || threads > kThreadsPerBlock || shared_bytes < 0) return 0;
  const int warps = (threads + 31) / 32;
  const int of_warp = round_up(std::max(registers, 1) * 32, kRegisterUnit);
  if (of_warp * round_up(warps, kSchedulers) > d.registers_per_block) return 0;
  const int warps_by_registers = d.registers_per_multiprocessor / kSchedulers / of_warp * kSchedulers;
  const int64_t shared = round_up(shared_bytes + d.shared_reserved_per_block, kSharedUnit);
  return std::min({d.threads_per_multiprocessor / 32 / warps, warps_by_registers / warps,
                   static_cast<int>(d.shared_per_multiprocessor / shared), d.blocks_per_multiprocessor});
}

int resident_blocks(const Device& d, const Code& code, int threads, int64_t shared_bytes) {
  return resident_blocks(d, assumed_registers(d, *code.source), threads, shared_bytes);
}

std::string shared_words(const Device& d, const Code& code, int64_t dynamic_shared) {
  return std::to_string(dynamic_shared) + " bytes of dynamic shared memory and " + std::to_string(code.shared_bytes) +
         " of the kernel's own: a block of " + d.arch + " has " + std::to_string(d.shared_per_block_optin);
}

int resident_clusters(const Device& d, int blocks_per_multiprocessor, int size) {
  if (!d.clusters || size < 1) return 0;
  // A cluster is within a GPC. 132 multiprocessors are left of the H100's 8 GPCs of 18, 148 of the B200's 8 of 20, 188
  // of the PRO 6000's 12 of 16; which ones are missing differs from one GPU to the next: assumed are six of 16 and two
  // of 18, six of 18 and two of 20, eight of 16 and four of 15. A slice is of 16 and what remains.
  const auto of_gpcs = [&](int count, int multiprocessors) {
    return count * (multiprocessors * blocks_per_multiprocessor / size);
  };
  if (d.multiprocessors != find_device(d.arch)->multiprocessors)
    return of_gpcs(d.multiprocessors / 16, 16) + of_gpcs(1, d.multiprocessors % 16);
  if (d.major == 9) return of_gpcs(6, 16) + of_gpcs(2, 18);
  return d.major == 10 ? of_gpcs(6, 18) + of_gpcs(2, 20) : of_gpcs(8, 16) + of_gpcs(4, 15);
}

}  // namespace gpuless

using namespace gpuless;

extern "C" {

int gpuless_set_device(const char* arch) { return set_device(arch) ? 0 : 1; }
const char* gpuless_device() { return current_device() ? current_device()->arch : ""; }
const gpuless_device_properties* gpuless_device_get() { return current_device(); }
int64_t gpuless_drop_launches(int on) { return std::max<int64_t>(0, std::exchange(dropped, on ? 0 : -1)); }

}  // extern "C"
