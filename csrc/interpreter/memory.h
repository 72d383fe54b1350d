#pragma once
// Address spaces. Global memory is host memory; shared and local memory have windows of their own in generic addresses,
// where no host pointer can lie (above 2^56).
#include <cstdint>
#include <shared_mutex>
#include <string>
#include <vector>

#include "program.h"
#include "shadow.h"

namespace forwardpass::interpreter {

struct Cta;

constexpr uint64_t kSharedWindow = uint64_t{1} << 56, kLocalWindow = uint64_t{1} << 57;
constexpr uint64_t kWindowMask = kSharedWindow | kLocalWindow;

// Which host memory kernels may touch. A pointer outside every interval is a finding; with no interval registered at
// all there is nothing to compare with, and that is an error too.
class Memory {
 public:
  struct Interval {
    uint64_t begin, end;
    bool read_only;
    std::string name;  // "argument x", "cudaMalloc", "__device__ table"
  };
  void add(const void* begin, int64_t bytes, std::string name, bool read_only = false);
  void remove(const void* begin);
  // The interval that has [address, address + bytes), or null. `hint` is a cache of the caller's, initially 0.
  const Interval* find(uint64_t address, uint64_t bytes, size_t& hint) const;
  std::string describe(uint64_t address) const;  // "12 bytes past the end of argument q (4096 bytes)"

 private:
  std::vector<Interval> sorted_;
};

// Host pointers for the active lanes' accesses of `bytes` each at `address` in a state space (none: generic), after
// bounds, alignment, race and initialisation checks.
void access(Warp&, ptx::Space, const uint64_t address[kLanes], int bytes, Use, Mask, uint8_t* host[kLanes]);
// One global range, for bulk copies.
uint8_t* access_global(Warp&, uint64_t address, uint64_t bytes, Use, int lane);
// One shared range of this CTA: bounds only; races are the caller's (Shadow).
uint8_t* shared_range(Warp&, uint64_t address, uint64_t bytes, int lane);

}  // namespace forwardpass::interpreter
