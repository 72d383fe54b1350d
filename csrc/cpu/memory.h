#pragma once
#include <cstdint>
#include <memory>

namespace forwardpass::cpu {

// Memory aligned to cache lines, as vectors and tiles are loaded and stored.
struct alignas(64) CacheLine {
  uint8_t bytes[64];
};
using CacheLines = std::unique_ptr<CacheLine[]>;
inline CacheLines allocate(int64_t bytes) { return CacheLines(new CacheLine[(bytes + 63) / 64]); }

}  // namespace forwardpass::cpu
