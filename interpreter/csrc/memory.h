#pragma once
// Address spaces. Global memory is host memory; shared and local memory have windows of their own in generic addresses,
// where no host pointer can lie (above 2^56). Addresses within .shared, .local and .param are offsets.
#include <atomic>
#include <cstdint>
#include <map>
#include <shared_mutex>
#include <string>
#include <vector>

#include "program.h"
#include "shadow.h"

namespace gpuless {

struct Cta;
struct Launch;

constexpr uint64_t kSharedWindow = uint64_t{1} << 56, kLocalWindow = uint64_t{1} << 57;
constexpr uint64_t kWindowMask = kSharedWindow | kLocalWindow;

// In the window of shared memory the low bits are an offset, and the bits above them name the CTA: 0 is the warp's own,
// 2 + rank is one of the cluster (.shared::cluster). So only an address that mapa made can be in another CTA; or, from
// sm_100 on, where one's own addresses in a cluster have the rank too, one whose lowest bit of the rank was cleared, as
// CUTLASS does to reach the even CTA of a pair.
constexpr int kRankShift = 24;
constexpr uint64_t shared_offset_of(uint64_t address) { return address & ((uint64_t{1} << kRankShift) - 1); }
constexpr uint64_t cluster_address(int rank, uint64_t offset) {
  return static_cast<uint64_t>(rank + 2) << kRankShift | offset;
}
// Whose shared memory an address is of; null: no CTA of the cluster has it.
Cta* shared_cta(Cta& issuer, uint64_t address);

// Which host memory kernels may touch. A pointer outside every interval is a finding; with no interval registered at
// all there is nothing to compare with, and that is an error too. Intervals may nest and overlap: what overlaps is one
// region, read-only if all of it is. Kernels add and remove too (device malloc), while others look up.
class Memory {
 public:
  // Part of the registered memory. A copy is valid as long as version() stays the same.
  struct Region {
    uint64_t begin = 0, end = 0;
    bool read_only = false;
    bool covers(uint64_t address, uint64_t bytes) const {
      return address >= begin && address < end && bytes <= end - address;
    }
  };
  void add(const void* begin, int64_t bytes, std::string name, bool read_only = false);
  int64_t remove(const void* begin);  // the last one added there; its bytes
  bool find(uint64_t address, uint64_t bytes, Region*) const;
  uint64_t largest() const;  // bytes of an interval
  uint64_t version() const { return version_.load(std::memory_order_acquire); }
  std::string describe(uint64_t address) const;  // "12 bytes past the end of argument q (4096 bytes)"

 private:
  struct Interval {
    uint64_t end;
    bool read_only;
    std::string name;  // "argument x", "cudaMalloc", "__device__ table"
  };
  void merge(uint64_t begin, uint64_t end);
  mutable std::shared_mutex mutex_;
  std::multimap<uint64_t, Interval> intervals_;  // as added, by begin
  std::vector<Region> regions_;                  // sorted, apart from each other
  std::atomic<uint64_t> version_{1};
};

// The regions that a warp touched last. Without it every access would take Memory's lock.
struct RegionCache {
  static constexpr int kEntries = 4;  // as many arguments as an inner loop touches
  Memory::Region regions[kEntries];
  uint64_t version = 0;
  int next = 0;
};

// What the lanes of an instruction access, for findings that know an address alone: Warp::accessing while it lives.
class LaneAddresses {
 public:
  LaneAddresses(Warp&, const uint64_t address[kLanes], int bytes, Mask, bool shared);
  ~LaneAddresses();
  LaneAddresses(const LaneAddresses&) = delete;
  int lane_of(uint64_t byte) const;  // the first lane; -1: none

 private:
  Warp& warp_;
  const uint64_t* address_;
  const int bytes_;
  const Mask mask_;
  const bool shared_;
};

enum class Scope : uint8_t { cta, cluster, gpu };

// What strong accesses carry from warp to warp of a cluster. Each is taken to acquire and release whatever its
// semantics, so that no order a program may rely on is missed; the price is that some races behind atomics go
// unnoticed. Those of scope .cta carry within their CTA alone. Knowledge is kept by 128-byte line of the address; lines
// that share a slot hide a race more.
class SyncPoints {
 public:
  void reset() { slots_.clear(); }
  void meet(Warp&, Mask lanes, uint64_t line, Scope);

 private:
  static constexpr size_t kSlots = 64;
  Knowledge& slot(uint64_t key) { return slots_[(key * 0x9e3779b97f4a7c15u) >> 58]; }
  std::vector<Knowledge> slots_;
};

// Where an address of global memory lies, module variables and parameters included.
std::string describe(const Launch&, uint64_t address);

// What a strong access orders: whether what it writes is .release or .acq_rel, and for whom.
struct Ordering {
  bool releases = false;
  Scope scope = Scope::gpu;
};

// Host pointers for the active lanes' accesses of `bytes` each (a power of two) at `address` in a state space (none:
// generic), after bounds, alignment, race and initialisation checks. A lane whose access cannot be made loads poison,
// and what it stores is dropped. `on_behalf`: where the lanes do
// not access memory each for itself, for whom lane l does, [l % 8].
void access(Warp&, ptx::Space, const uint64_t address[kLanes], int bytes, Use, Mask, uint8_t* host[kLanes],
            Ordering = {}, const LaneSet* on_behalf = nullptr);
// One global range, for bulk copies. `under_way`: of a store that is not complete, which is to be told again then.
uint8_t* access_global(Warp&, uint64_t address, uint64_t bytes, Use, int lane, bool under_way = false);
// The CTA whose shared memory has the range, its own or, for .shared::cluster, one of the cluster; the range begins at
// shared_offset_of(address). Bounds only: races are the caller's (Shadow), and that the CTA lives (Cta::visited).
Cta& shared_range(Warp&, uint64_t address, uint64_t bytes, bool cluster, Use, int lane);

}  // namespace gpuless
