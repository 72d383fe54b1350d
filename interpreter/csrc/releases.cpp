#include "releases.h"

#include <algorithm>

#include "machine.h"

namespace gpuless {

// After 2^32 - 1 releases time stands still, and everything that is released counts as acquired.
Clock Releases::time() const { return static_cast<Clock>(std::min<uint64_t>(releases_, ~Clock{0})); }

void Releases::release(const Warp& w, bool itself) {
  Cluster& cluster = *w.cta->cluster;
  if (!itself && !cluster.fenced.width) return;
  const Clock *const seen = w.knowledge.seen.clocks + kFirstWarp, *const fenced = cluster.fenced.clocks + kFirstWarp;
  const size_t warps = cluster.warps.size();
  if (!cluster.releases) {
    const std::lock_guard lock(mutex_);
    auto& log = logs_[cluster.number];
    log = std::make_unique<ReleaseLog>();
    cluster.releases = log.get();
  }
  ReleaseLog& log = *cluster.releases;
  const std::lock_guard lock(log.mutex);
  if (log.times.size() == kKept) {
    for (size_t k = 0; k < kKept / 2; ++k) {
      log.times[k] = log.times[2 * k];
      std::copy_n(&log.clocks[(2 * k + 1) * warps], warps, &log.clocks[k * warps]);
    }
    log.times.resize(kKept / 2);
    log.clocks.resize(kKept / 2 * warps);
  }
  ++releases_;
  log.times.push_back(time());
  const size_t last = log.clocks.size();
  log.clocks.resize(last + warps);
  for (size_t k = 0; k < warps; ++k) {
    const Clock clock = (itself ? seen[k] : std::min(seen[k], fenced[k])) - (cluster.base - 1);
    log.clocks[last + k] = last ? std::max(clock, log.clocks[last - warps + k]) : clock;
  }
}

void Releases::acquire(Warp& w) const {
  Clock& acquire_time = w.knowledge.seen.clocks[kAcquireAgent];
  acquire_time = std::max(acquire_time, time());
}

Clock Releases::known(uint64_t cluster, int warp, Clock acquired) {
  ReleaseLog* log;
  {
    const std::lock_guard lock(mutex_);
    const auto entry = logs_.find(cluster);
    if (entry == logs_.end()) return 0;
    log = entry->second.get();
  }
  const std::lock_guard lock(log->mutex);
  const size_t count = std::upper_bound(log->times.begin(), log->times.end(), acquired) - log->times.begin();
  return count ? log->clocks[(count - 1) * (log->clocks.size() / log->times.size()) + warp] : 0;
}

}  // namespace gpuless
