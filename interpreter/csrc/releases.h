#pragma once
// What the clusters of a launch release to each other through global memory.
//
// A strong write releases what its warp knows of the warps of its cluster: their clocks are kept with the time of the
// write. A relaxed one releases the part of it that a fence came after, whoever's: programs fence in one thread after
// the barrier, or in each before it. A strong read, relaxed or not, acquires what had been released by then: the warp's
// clock of kAcquireAgent becomes the time of the read, and goes on from warp to warp as all it knows does. So a write
// of another cluster is known if a release that came early enough covers it; one that no barrier has ordered before the
// releasing warp is not covered.
//
// Times are of the launch as a whole: which address is written and read does not matter, so that no chain of releases
// that a program may rely on is missed. The price is that a wait for the wrong flag goes unnoticed where the right one
// was set before it.
#include <atomic>
#include <cstdint>
#include <memory>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "clock.h"

namespace gpuless {

struct Cluster;
struct Warp;

// Of one cluster.
struct ReleaseLog {
  std::mutex mutex;           // clusters on other threads look things up
  std::vector<Clock> times;   // of releases, ascending
  std::vector<Clock> clocks;  // [release][warp of the cluster], since the cluster began and from 1: all released so far
};

class Releases {
 public:
  // Called before a strong write to global memory, so that whoever reads the value finds the release.
  void release(const Warp&, bool itself);  // false: it is relaxed
  // Called after a strong read of global memory, so that the release of the value has been recorded.
  void acquire(Warp&) const;
  void forget() {
    logs_.clear();
    releases_ = 0;
  }
  // The clock of a warp of a cluster, since the cluster began, up to which a warp that last acquired at time `acquired`
  // knows it; 0: not at all.
  Clock known(uint64_t cluster, int warp, Clock acquired);

 private:
  // When a log is full, pairs of releases are merged, each to the clocks of the second at the time of the first. This
  // forgets some races and raises no false alarm.
  static constexpr size_t kKept = 64;
  Clock time() const;
  std::atomic<uint64_t> releases_{0};
  std::mutex mutex_;                                                // of logs_
  std::unordered_map<uint64_t, std::unique_ptr<ReleaseLog>> logs_;  // by the number of the cluster
};

}  // namespace gpuless
