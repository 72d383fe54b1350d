#pragma once
// Happens-before. An agent is whoever touches memory on its own: a warp, or a series of asynchronous operations. Each
// has a clock that advances when it releases something; a vector clock says how far one knows every agent.
// Flanagan and Freund, FastTrack (PLDI 2009), with the async proxy of the PTX memory model (ISA 8) on top.
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace gpuless {

using Clock = uint32_t;
// Agents: the other clusters, the grids before, then the warps of all CTAs of the cluster, by rank, then the series of
// asynchronous operations, as they turn up (Cluster::new_series).
constexpr int kMaxWarps = 32, kMaxCtas = 16;  // of a CTA, of a cluster
constexpr int kAcquireAgent = 0, kGridAgent = 1, kFirstWarp = 8, kMaxAgents = 768;
// The agent kGridAgent is the grids launched before this one, which a programmatic dependent launch may overtake: seen
// is 1 once they are known to have ended (griddepcontrol.wait, or an ordinary launch), 0 before. kAcquireAgent is the
// launch's other clusters: seen is when one has last acquired what they release (releases.h), 0: never.

// To the next multiple of the clocks that are handled at once.
constexpr int round_up(int agents) { return (agents + 7) / 8 * 8; }

// Its width covers the agents that it may know of: most often a few warps and series. Of agents beyond the width it
// knows nothing, and their elements are not initialised.
struct alignas(32) VectorClock {
  int width = 0;  // a multiple of 8; in front, as most clocks end long before the last agent
  alignas(32) Clock clocks[kMaxAgents];

  VectorClock() = default;
  VectorClock(const VectorClock& other) { *this = other; }
  VectorClock& operator=(const VectorClock& other) {
    width = other.width;
    std::memcpy(clocks, other.clocks, width * sizeof(Clock));
    return *this;
  }
  void widen(int agents, Clock clock = 0) {
    for (const int end = round_up(agents); width < end; width += 8)
      _mm256_store_si256(reinterpret_cast<__m256i*>(clocks + width), _mm256_set1_epi32(static_cast<int>(clock)));
  }
  void set(int agent, Clock clock) {
    widen(agent + 1);
    clocks[agent] = clock;
  }
  void join(const VectorClock& other) {
    widen(other.width);
    combine(other, [](__m256i a, __m256i b) { return _mm256_max_epu32(a, b); });
  }
  void meet(const VectorClock& other) {  // what both know
    width = std::min(width, other.width);
    combine(other, [](__m256i a, __m256i b) { return _mm256_min_epu32(a, b); });
  }

 private:
  // Vectorised by hand: the compiler does not know that the width is a multiple of 8 and that the arrays do not
  // overlap.
  template <class F>
  void combine(const VectorClock& other, F f) {
    for (int i = 0; i < std::min(width, other.width); i += 8) {
      auto* times = reinterpret_cast<__m256i*>(clocks + i);
      _mm256_store_si256(times, f(*times, *reinterpret_cast<const __m256i*>(other.clocks + i)));
    }
  }
};

// What a synchronisation carries from one agent to another. A generic write that another agent knows of through `seen`
// may be touched by the async proxy only once `proxied` covers it too: fence.proxy.async sets proxied to seen.
struct Knowledge {
  VectorClock seen, proxied;
  void join(const Knowledge& other) {
    seen.join(other.seen);
    proxied.join(other.proxied);
  }
  void meet(const Knowledge& other) {
    seen.meet(other.seen);
    proxied.meet(other.proxied);
  }
};

}  // namespace gpuless
